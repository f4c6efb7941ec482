"""What all optimizers share: gathering tensors, choosing native or plain PyTorch, states and checkpoints.

An algorithm derives from :class:`FusedStep` and from its ``torch.optim`` class, and says which states it
keeps and how the two ways of stepping are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Parameter

from dlfast._native import native
from dlfast.optim._options import check_engine, overlaps_itself

# Which code runs a step is the choice of the optimizer at hand, not of a checkpoint.
ENGINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")
NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Subclasses (DTensor ...) have an arithmetic of their own, which plain PyTorch respects.
PLAIN_TYPES = (Parameter, Tensor)


def native_devices() -> tuple[str, ...]:
    if native.module is None:
        return ()
    return ("cpu", "cuda") if native.build.get("cuda") else ("cpu",)


class Bucket:
    """The tensors of one native call: parameters of one dtype and device with a gradient."""

    __slots__ = ("device", "grads", "groups", "native", "params")

    def __init__(self, device: torch.device, is_native: bool) -> None:
        self.device = device
        self.native = is_native
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.groups: list[int] = []  # index into param_groups, for each parameter


class FusedStep(torch.optim.Optimizer):
    """The machinery of a fused step; see :mod:`dlfast.optim`.

    Under ``torch.amp.GradScaler`` the gradients are unscaled inside the step, in registers: ``p.grad``
    itself is only read, and keeps the scaled gradient. (torch's fused optimizers overwrite it; to look at
    unscaled gradients call ``scaler.unscale_(optimizer)`` first, as for every optimizer.) On CUDA neither
    the scale nor ``found_inf`` is read by the host.
    """

    # GradScaler then leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True

    # State tensors with the parameter's shape, as in the state_dict of torch.optim.
    _state_names: tuple[str, ...] = ()
    # Options that tell a state_dict of this algorithm from another's.
    _own_options: tuple[str, ...] = ()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: called first, with gradients enabled; reevaluates the model and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: for a sparse gradient, and for a parameter that overlaps itself in memory; nothing
                has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    # ---- For the algorithms -------------------------------------------------------------------------------

    def _check_options(self, options: dict[str, Any]) -> None:
        raise NotImplementedError

    def _native_step(self, bucket: Bucket, lr: list[float], lr_tensors: list[Tensor], scalars: dict[str, Any]) -> None:
        raise NotImplementedError

    def _plain_step(self, bucket: Bucket, grad_scale: float) -> None:
        raise NotImplementedError

    # ---- One step -----------------------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def _step(self) -> None:
        buckets = self._gather()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and not all(b.native and b.device.type == "cuda" for b in buckets):
            if found_inf.item() != 0:
                return
            found_inf = None
        for bucket in buckets:
            if not bucket.native:
                self._plain_step(bucket, 1.0 if grad_scale is None else grad_scale.item())
                continue
            scalars: dict[str, Any] = {}
            if grad_scale is not None:
                scalars["grad_scale"] = grad_scale.to(bucket.device, torch.float32, non_blocking=True)
            if found_inf is not None:
                scalars["found_inf"] = found_inf.to(bucket.device, torch.float32, non_blocking=True)
            if bucket.device.type == "cuda":
                scalars["arrived"] = self._arrived(bucket.device)
            self._native_step(bucket, *self._learning_rates(bucket.device), scalars)

    def _gather(self) -> list[Bucket]:
        buckets: dict[tuple[torch.device, torch.dtype, bool], Bucket] = {}
        devices = native_devices()
        for index, group in enumerate(self.param_groups):
            wants_native = group.get("fused") is not False
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{self._name(index, i)} has a sparse gradient (layout {grad.layout}), which "
                        f"dlfast.optim.{type(self).__name__} does not support"
                    )
                device, dtype = p.device, p.dtype
                is_native = (
                    wants_native
                    and device.type in devices
                    and dtype in NATIVE_DTYPES
                    and type(p) in PLAIN_TYPES
                    and type(grad) in PLAIN_TYPES
                )
                bucket = buckets.get((device, dtype, is_native))
                if bucket is None:
                    bucket = buckets[device, dtype, is_native] = Bucket(device, is_native)
                bucket.params.append(p)
                bucket.grads.append(grad)
                bucket.groups.append(index)
        found = list(buckets.values())
        self._refuse(found)
        return found

    def _refuse(self, buckets: list[Bucket]) -> None:
        """What must be known of all buckets before any is written; a native call checks its own."""
        captured = {i for i, group in enumerate(self.param_groups) if group.get("capturable")}
        for bucket in buckets:
            if captured and bucket.device.type == "cpu" and not captured.isdisjoint(bucket.groups):
                raise RuntimeError("capturable=True needs parameters on a GPU, but one of its group is on the CPU")
            if len(buckets) == 1 and bucket.native:
                continue
            for p in bucket.params:
                if overlaps_itself(p):
                    raise RuntimeError(f"{self._name_of(p)} overlaps itself in memory (expanded?); clone it first")

    def _learning_rates(self, device: torch.device) -> tuple[list[float], list[Tensor]]:
        """Of all groups, as numbers; or, to spare the host a wait, as tensors where one is on the GPU."""
        values = [group["lr"] for group in self.param_groups]
        if device.type == "cuda" and any(isinstance(lr, Tensor) and lr.is_cuda for lr in values):
            tensors = [
                lr.to(device, non_blocking=True)
                if isinstance(lr, Tensor)
                else torch.tensor(lr, dtype=torch.float64, device=device)
                for lr in values
            ]
            return [0.0] * len(values), tensors
        numbers = [float(lr) for lr in values]
        for index, lr in enumerate(numbers):
            if lr != lr:
                raise ValueError(f"lr of param_groups[{index}] is NaN")
        return numbers, []

    def _arrived(self, device: torch.device) -> Tensor:
        """A counter that the blocks of a CUDA step use; it is 0 between steps."""
        counters: dict[torch.device, Tensor] = vars(self).setdefault("_arrived_counters", {})
        if device not in counters:
            counters[device] = torch.zeros((), dtype=torch.int32, device=device)
        return counters[device]

    def _name(self, group: int, i: int) -> str:
        names = self.param_groups[group].get("param_names")
        return f"parameter {names[i]!r}" if names else f"param_groups[{group}]['params'][{i}]"

    def _name_of(self, param: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p is param:
                    return self._name(index, i)
        return "a parameter"

    # ---- Groups and checkpoints ---------------------------------------------------------------------------

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as ``torch.optim``; its options and parameters are checked first."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_engine(type(self).__name__, options)
            self._check_options(options)
        count = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            for i, p in enumerate(self.param_groups[-1]["params"]):
                if p.is_complex():
                    raise RuntimeError(
                        f"{self._name(count, i)} is complex ({p.dtype}), which is not supported; "
                        "optimize torch.view_as_real of it"
                    )
                if overlaps_itself(p):
                    raise RuntimeError(
                        f"{self._name(count, i)} of shape {tuple(p.shape)} and strides {p.stride()} overlaps "
                        "itself in memory (expanded?); clone it first"
                    )
        except RuntimeError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group, own in zip(state["param_groups"], vars(self).get("param_groups", ()), strict=False):
            group.update({name: own[name] for name in ENGINE_OPTIONS if name in own})
        self._check_loaded(state)
        super().__setstate__(state)
        vars(self).pop("_arrived_counters", None)
        for p, entry in self.state.items():
            if isinstance(p, Tensor):
                self._settle(p, entry)

    def _check_loaded(self, state: dict[str, Any]) -> None:
        for index, group in enumerate(state["param_groups"]):
            missing = [name for name in self._own_options if name not in group]
            if missing:
                raise ValueError(
                    f"param_groups[{index}] of the state_dict lacks {', '.join(missing)}: it is not one of "
                    f"{type(self).__name__}"
                )
            for i, p in enumerate(group["params"]):
                for name, value in state["state"].get(p, {}).items():
                    if name in self._state_names and value is not None and value.shape != p.shape:
                        raise ValueError(
                            f"{name} in the state_dict has shape {tuple(value.shape)} for parameter {i} of "
                            f"param_groups[{index}], which has {tuple(p.shape)}"
                        )

    def _settle(self, p: Tensor, entry: dict[str, Any]) -> None:
        """Bring loaded states into the parameter's memory layout, once instead of at every step."""
        for name in self._state_names:
            value = entry.get(name)
            if value is not None and value.stride() != p.stride():
                entry[name] = torch.empty_like(p, memory_format=torch.preserve_format).copy_(value)


if native.module is not None:
    # A step returns nothing, so there is nothing to say of its outputs' shapes.
    for _op in ("_sgd_step_", "_adam_step_"):
        torch.library.register_fake(f"dlfast::{_op}", lambda *args, **kwargs: None)
