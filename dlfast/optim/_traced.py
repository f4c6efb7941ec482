"""The step as an operator that ``torch.compile`` takes into a graph without looking inside.

The graph hands the operator what the step writes and reads, so that it knows what comes before and after.
Everything else, learning rates above all, the operator asks the optimizer when it runs: a change of them
recompiles nothing.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_handles = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(optimizer: Any) -> int:
    """A number by which the operator finds `optimizer` again."""
    handle = next(_handles)
    _optimizers[handle] = optimizer
    return handle


def traced_step(optimizer: Any, closure: Callable[[], Any] | None) -> Any:
    """What :meth:`FusedStep.step` is while ``torch.compile`` traces it."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    which: list[int] = []
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for i, p in enumerate(optimizer._all_params):
        if p.grad is not None:
            which.append(i)
            params.append(p)
            grads.append(p.grad)
    with torch.no_grad():
        torch.ops.dlfast.optimizer_step(
            optimizer._handle,
            which,
            params,
            grads,
            optimizer._all_states,
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
        )
    return loss


@torch.library.custom_op("dlfast::optimizer_step", mutates_args=("params", "grads", "states"))
def _optimizer_step(
    handle: int,
    which: list[int],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    optimizer = _optimizers[handle]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if len(own) != len(optimizer._all_params) or any(p is not q for p, q in zip(own, optimizer._all_params)):  # noqa: B905
        raise RuntimeError("param_groups of a compiled step have changed; add parameters with add_param_group")
    given: list[Tensor | None] = [None] * len(own)
    for i, grad in zip(which, grads, strict=True):
        given[i] = grad
    pairs = [*zip((own[i] for i in which), params, strict=True), *zip(optimizer._all_states, states, strict=True)]
    signals = {"grad_scale": grad_scale, "found_inf": found_inf}
    with _standing_in(pairs), _attributes(optimizer, signals), _gradients(own, given):
        optimizer._step(None)


@_optimizer_step.register_fake
def _(
    handle: int,
    which: list[int],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    return None


@contextmanager
def _standing_in(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within, the first of each pair, which the optimizer holds, has the values of the second, which the graph
    has passed; afterwards the second has what became of them. A graph passes a copy where it needs the value
    from before the step, too."""
    apart = [(own, given) for own, given in pairs if own.data_ptr() != given.data_ptr()]
    with torch.no_grad():
        kept = [own.clone() for own, _ in apart]
        for own, given in apart:
            own.copy_(given)
    try:
        yield
    finally:
        with torch.no_grad():
            for (own, given), value in zip(apart, kept, strict=True):
                given.copy_(own)
                own.copy_(value)


@contextmanager
def _attributes(optimizer: Any, values: dict[str, Tensor | None]) -> Iterator[None]:
    before = {name: getattr(optimizer, name) for name in values if hasattr(optimizer, name)}
    for name, value in values.items():
        setattr(optimizer, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(optimizer, name, before[name])
            else:
                delattr(optimizer, name)


@contextmanager
def _gradients(params: list[Tensor], given: list[Tensor | None]) -> Iterator[None]:
    before = [p.grad for p in params]
    for p, grad in zip(params, given, strict=True):
        if p.grad is not grad:
            p.grad = grad
    try:
        yield
    finally:
        for p, grad in zip(params, before, strict=True):
            if p.grad is not grad:
                p.grad = grad
