"""The step of parameters that all lie on CUDA devices: launches only, and no look at what the device holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlfast._native import native
from dlfast.optim._options import FLAGS
from dlfast.optim._prepare import Bucket, Prepared, Preparing, refuse_under_capture
from dlfast.optim._zero import Shards


@dataclass
class Kept:
    """What a device keeps from step to step, beside the states."""

    arrived: Tensor  # int32, counts the blocks of a launch; 0 between launches
    random_steps: Tensor  # int64, steps that drew random numbers, beside those the host counts
    last_norm: Tensor  # float64, of the gradients at the last step that was not skipped


class OnDevice(Preparing):
    """Steps whose outcome only the device knows: see csrc/optim/op_cuda.cpp."""

    grad_norm: Tensor | None
    found_inf: Tensor
    _kept: dict[torch.device, Kept]
    _skipped: bool | Tensor
    _shards: Shards | None

    def _norm_is_shared(self) -> bool:
        """Whether a step measures what other processes hold, too, so that all of them must take part."""
        if self._shards is None:
            return False
        values = vars(self)
        finds_inf = values.get("grad_scale") is not None and values.get("found_inf") is None
        return finds_inf or self._extras.max_grad_norm is not None

    def _hyper(self) -> list[tuple[float, ...]]:
        raise NotImplementedError

    def _options_now(self, unscale: float, finds_inf: bool) -> Any:
        raise NotImplementedError

    def _step(self, only: Tensor | None) -> None:
        raise NotImplementedError

    def _run_on_device(self, prepared: Prepared, scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Take the step; False, before anything has changed, where a native step no longer holds."""
        finds_inf = scale is not None and found_inf is None
        buckets = prepared.buckets
        options = self._options_now(1.0, finds_inf)
        first = buckets[0].device if buckets else None
        norm = skipped = None
        if first is not None and self._extras.max_grad_norm is not None:
            wide = all(m.param.dtype is torch.float64 for b in buckets for m in b.members)
            norm = torch.empty((), dtype=torch.float64 if wide else torch.float32, device=first)
        if first is not None and finds_inf:
            skipped = torch.empty((), dtype=torch.float32, device=first)

        def fill(memory: Any, device: torch.device) -> None:
            kept = self._kept_on(device)
            if self._extras.draws:
                memory.random_steps = kept.random_steps
            if options.measure_norm:
                count = sum(b.device == device for b in buckets)
                memory.squares = torch.empty(count, dtype=torch.float64, device=device)
            if device == first:
                memory.norm, memory.last_norm, memory.skipped = norm, kept.last_norm, skipped

        if buckets and not self._launch(buckets, options, scale, found_inf, fill):
            return False
        self._skipped = skipped if skipped is not None else found_inf if found_inf is not None else False
        if self._extras.max_grad_norm is not None:
            self.grad_norm = norm
        return True

    def _launch(
        self,
        buckets: list[Bucket],
        options: Any,
        scale: Tensor | None,
        found_inf: Tensor | None,
        fill: Callable[[Any, torch.device], None] | None = None,
    ) -> bool:
        """The launches of CUDA `buckets`; False, before anything has changed, where a native step no longer holds."""
        assert native.module is not None
        numbers = [self._numbers(group) for group in self.param_groups]
        on_device = any(isinstance(v, Tensor) and v.is_cuda for row in numbers for v in row)
        if on_device:
            for i, group in enumerate(self.param_groups):
                self._check_group(i, group)
            named = [zip(self._number_names, row, strict=True) for row in numbers]
            numbers = [tuple(bool(v) if name in FLAGS else v for name, v in row) for row in named]
        hyper: list[tuple[float, ...]] = [()] * len(numbers) if on_device else self._hyper()
        memories: dict[torch.device, Any] = {}
        for device in {b.device: None for b in buckets}:
            memory = memories[device] = native.module.DeviceMemory()
            memory.grad_scale, memory.found_inf = (
                None if t is None else t.to(device, torch.float32, non_blocking=True) for t in (scale, found_inf)
            )
            memory.arrived = self._kept_on(device).arrived
            memory.hyper = _on_device(numbers, device) if on_device else None
            if fill is not None:
                fill(memory, device)
        shards = self._shards
        apart = len(memories) > 1 or shards is not None or any(b.mesh_dims for b in buckets)
        done: bool = native.module.run_cuda(
            [b.native_step for b in buckets],
            [b.grads() for b in buckets],
            [memories[b.device] for b in buckets],
            self.state,
            hyper,
            options,
            (lambda: _exchange(buckets, memories, shards)) if apart else None,
        )
        return done

    def _kept_on(self, device: torch.device) -> Kept:
        if device not in self._kept:
            refuse_under_capture("counters")
            self._kept[device] = Kept(
                torch.zeros((), dtype=torch.int32, device=device),
                torch.zeros((), dtype=torch.int64, device=device),
                torch.full((), torch.nan, dtype=torch.float64, device=device),
            )
        return self._kept[device]

    # ---- For dlfast.graphed, which captures steps -----------------------------------------------------------

    def _is_native(self) -> bool:
        """Whether the last step was, of all parameters."""
        return self._prepared.get(None) is not None

    def _make_states(self, device: torch.device) -> None:
        """Make all that a step with these gradients writes, with its first values: by a step that is skipped."""
        given = vars(self).get("found_inf")
        self.found_inf = torch.ones((), device=device)
        try:
            self._step(None)
        finally:
            if given is None:
                del self.found_inf
            else:
                self.found_inf = given

    def _beside_states(self) -> dict[Any, Tensor]:
        """The tensors that a step writes and `state` does not hold."""
        return {(name, d): t for d, kept in self._kept.items() for name, t in vars(kept).items()}

    def _random_steps_taken(self) -> int:
        """How many steps drew random numbers; waits for the devices that count them."""
        return self._random_step + max((int(kept.random_steps.item()) for kept in self._kept.values()), default=0)

    def _set_random_steps(self, count: int) -> None:
        self._random_step = count
        for kept in self._kept.values():
            kept.random_steps.zero_()


def _exchange(buckets: list[Bucket], memories: dict[torch.device, Any], shards: Shards | None) -> None:
    """Add the squares of what other processes and other devices hold."""
    index = dict.fromkeys(memories, 0)
    for bucket in buckets:
        part = memories[bucket.device].squares[index[bucket.device]]
        index[bucket.device] += 1
        for dim in bucket.mesh_dims:
            torch.distributed.all_reduce(part, group=bucket.mesh.get_group(dim))
    if len(memories) > 1:
        parts = [memory.squares for memory in memories.values()]
        for device, memory in memories.items():
            memory.squares = torch.cat([part.to(device, non_blocking=True) for part in parts])
    if shards is not None:
        for memory in memories.values():
            memory.squares = memory.squares.sum().view(1)
        total = next(iter(memories.values())).squares
        shards.add(total)
        for device, memory in memories.items():
            memory.squares = total.to(device, non_blocking=True)


def _on_device(rows: list[tuple[Any, ...]], device: torch.device) -> Tensor:
    """The numbers of all groups as float64 [groups, 8]; those that lie on the device are not waited for."""
    padded = [[*row, *[0.0] * (8 - len(row))] for row in rows]
    # Filled there: a copy from the host would wait, or be lost to a captured graph.
    return torch.stack(
        [
            v.detach().to(device, torch.float64).reshape(())
            if isinstance(v, Tensor)
            else torch.full((), float(v), dtype=torch.float64, device=device)
            for row in padded
            for v in row
        ]
    ).view(len(rows), 8)
