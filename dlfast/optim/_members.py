"""One parameter of a step with what belongs to it, and its step in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlfast._native import native
from dlfast.optim import _formats
from dlfast.optim._formats import in_memory_order

HALVES = (torch.bfloat16, torch.float16)


def local_of(t: Tensor) -> Tensor:
    """The part of a DTensor that lies on this process; any other tensor itself."""
    local: Tensor = t._local_tensor if is_dtensor(t) else t  # type: ignore[attr-defined]
    return local


def is_dtensor(t: Tensor) -> bool:
    # Asked by attribute: importing torch.distributed.tensor takes a second that most programs need not spend.
    return hasattr(t, "_local_tensor") and hasattr(t, "placements")


def sharded_over(t: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The device mesh of a DTensor and those of its dimensions over which `t` is split; (None, ()) otherwise."""
    if not is_dtensor(t):
        return None, ()
    placements: tuple[Any, ...] = t.placements  # type: ignore[attr-defined]
    mesh = t.device_mesh  # type: ignore[attr-defined]
    return mesh, tuple(d for d, placement in enumerate(placements) if not placement.is_replicate())


@dataclass
class Member:
    """A parameter that takes part in a step; tensors are this process's parts of DTensors."""

    key: Tensor  # the parameter as param_groups has it
    param: Tensor
    group: int  # index into param_groups
    number: int  # counts the parameters of all groups
    native: bool
    entry: dict[str, Any]  # of optimizer.state
    names: tuple[str, ...]  # of the states, in the order of the native rule
    step: Tensor | None = None  # counts the steps taken
    watched: list[str] = field(default_factory=list)  # entries that a native step relies on

    @property
    def grad(self) -> Tensor:
        # Not kept: a prepared step must not hold gradients beyond their time.
        grad = self.key.grad
        assert grad is not None
        return local_of(grad)

    def state(self, name: str) -> Tensor | None:
        value = self.entry.get(name)
        return None if value is None else local_of(value)

    @property
    def master(self) -> Tensor | None:
        return self.state("master_low") if self.param.dtype is torch.bfloat16 else self.state("master_param")

    def native_item(self, unsigned: frozenset[str], stochastic_param: bool, stochastic_state: bool) -> Any:
        """As the native step takes it (csrc/optim/op_step.cpp)."""
        assert native.module is not None
        states = tuple(self.state(name) for name in self.names)
        scales = tuple(self.entry.get(name + "_scale") for name in self.names)
        formats = tuple(
            None if scale is None else "unsigned" if name in unsigned else "signed"
            for name, scale in zip(self.names, scales, strict=True)
        )
        watched = tuple((name, self.entry[name]) for name in self.watched)
        entry = self.entry if self.watched else None
        return native.module.StepItem(
            key=self.key, param=self.param, entry=entry, states=states, scales=scales, formats=formats,
            average=self.state("ema"), master=self.master, step=self.step, group=self.group, id=self.number,
            stochastic_param=stochastic_param, stochastic_state=stochastic_state, watched=watched,
        )  # fmt: skip


@dataclass
class PlainOptions:
    """What a plain step needs of the optimizer's options; see StepOptions in csrc/optim/params.h."""

    grad_factor: float
    clip_factor: float
    max_grad_value: float | None
    ema_decay: float | None
    stochastic_param: bool
    stochastic_state: bool
    seed: int
    random_step: int


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def unscaled(member: Member, options: PlainOptions) -> Tensor:
    """The gradient as the norm sees it: unscaled, and clipped by value."""
    grad = member.grad.to(compute_dtype(member.param.dtype)) * options.grad_factor
    return grad if options.max_grad_value is None else grad.clamp(-options.max_grad_value, options.max_grad_value)


def plain_step(
    member: Member,
    unsigned: frozenset[str],
    options: PlainOptions,
    update: Callable[[Tensor, Tensor, dict[str, Tensor], float], None],
) -> None:
    """The step of one parameter; `update(param, grad, states, step)` changes param and states in place."""
    real = compute_dtype(member.param.dtype)
    grad = unscaled(member, options) * options.clip_factor
    param = _exact_param(member, real)
    states = {name: _decoded(member, name, name not in unsigned, real) for name in member.names}
    step = 1.0 if member.step is None else member.step.item() + 1
    update(param, grad, states, step)

    for slot, name in enumerate(member.names, 1):
        random = _random(member, slot, options) if options.stochastic_state else None
        _store_state(member, name, states[name], name not in unsigned, random)
    _store_param(member, param, _random(member, 0, options) if options.stochastic_param else None)
    average = member.state("ema")
    if average is not None and options.ema_decay is not None:
        weights = param if member.master is not None else member.param.to(real)
        average.copy_(average * options.ema_decay + weights * (1 - options.ema_decay))
    if member.step is not None:
        member.step += 1


@torch.no_grad()
def move_averages(params: list[Tensor], entries: Any, decay: float, skipped: bool | Tensor) -> None:
    """The averages in `entries`, an optimizer's state, of parameters that a step left alone: on to the weights.

    `skipped` is a tensor where only the device knows whether the step was taken.
    """
    averages, weights = [], []
    for p in params:
        m = Member(p, local_of(p), 0, 0, False, entries.get(p) or {}, ())
        average = m.state("ema")
        if average is not None:
            averages.append(average)
            weights.append(m.param.to(average.dtype) if m.master is None else _exact_param(m, average.dtype))
    if averages and not isinstance(skipped, Tensor):
        torch._foreach_lerp_(averages, weights, 1 - decay)
    elif isinstance(skipped, Tensor):
        for average, weight in zip(averages, weights, strict=True):
            stays = skipped.to(average.device, non_blocking=True).reshape(()) != 0
            average.copy_(torch.where(stays, average, average.lerp(weight, 1 - decay)))


def _random(member: Member, slot: int, options: PlainOptions) -> Tensor:
    """16 bits per element, of the parameter's shape."""
    p = member.param
    bits = _formats.random_bits(p.numel(), options.seed, options.random_step, 4 * member.number + slot, p.device)
    out = torch.empty_like(p, dtype=torch.int64)
    in_memory_order(out).copy_(bits)
    return out


def _exact_param(member: Member, real: torch.dtype) -> Tensor:
    master = member.master
    if master is None:
        return member.param.to(real, copy=True)
    if member.param.dtype is torch.bfloat16:
        return _formats.join_halves(member.param, master)
    return master.clone()


def _store_param(member: Member, exact: Tensor, random: Tensor | None) -> None:
    p, master = member.param, member.master
    if master is not None and p.dtype is torch.bfloat16:
        upper, lower = _formats.split_halves(exact)
        p.copy_(upper)
        master.copy_(lower)
        return
    if master is not None:
        master.copy_(exact)
    p.copy_(exact if random is None or p.dtype not in HALVES else _formats.round_stochastic(exact, p.dtype, random))


def _decoded(member: Member, name: str, signed: bool, real: torch.dtype) -> Tensor:
    value = member.state(name)
    assert value is not None
    scale = member.entry.get(name + "_scale")
    if scale is None:
        return value.to(real, copy=True)
    out = torch.empty_like(value, dtype=real)
    in_memory_order(out).copy_(_formats.decode(in_memory_order(value), scale, signed))
    return out


def _store_state(member: Member, name: str, value: Tensor, signed: bool, random: Tensor | None) -> None:
    kept = member.state(name)
    assert kept is not None
    scale = member.entry.get(name + "_scale")
    if scale is not None:
        draws = None if random is None else in_memory_order(random)
        codes, scales = _formats.encode(in_memory_order(value), signed, draws)
        in_memory_order(kept).copy_(codes)
        scale.copy_(scales)
    elif random is not None and kept.dtype is torch.bfloat16:
        kept.copy_(_formats.round_stochastic(value, torch.bfloat16, random))
    else:
        kept.copy_(value)
