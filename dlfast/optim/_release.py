"""Updating each parameter during backward, as soon as its gradient is there."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from dlfast.optim._step import FusedStep


class StepInBackward:
    """What :func:`step_in_backward` returns: ``remove()`` ends it, as does leaving a ``with`` block."""

    def __init__(self, optimizer: FusedStep) -> None:
        self.optimizer = optimizer
        self._ddp_is_ruled_out = False
        hooked = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        _refuse_ddp(hooked)
        self._handles = [p.register_post_accumulate_grad_hook(self._release) for p in hooked]

    def _release(self, p: Tensor) -> None:
        _check(self.optimizer)
        if not self._ddp_is_ruled_out:  # the model may have been wrapped since
            _refuse_ddp(q for group in self.optimizer.param_groups for q in group["params"])
            self._ddp_is_ruled_out = True
        self.optimizer._step(p)
        p.grad = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def step_in_backward(optimizer: FusedStep) -> StepInBackward:
    """From now on, update each parameter in ``backward()``, and free its gradient.

    At most the gradients of one layer are then there at a time. ``optimizer.step()`` finds no gradients and
    does nothing; ``optimizer.step_was_skipped`` and step hooks have no meaning. A parameter that is used in
    several calls of backward is updated in each, and its average, with `ema_decay`, moves then. Parameters added
    later are not included, nor are those that ``torch.utils.swap_tensors`` has changed, which takes hooks away:
    after such a conversion of the model remove the handle and call this again.

    ``fully_shard`` reduces gradients before they are there: it works. ``DistributedDataParallel`` reduces them
    after: each process would step with a gradient of its own, so this is refused.

    Args:
        optimizer: an optimizer of :mod:`dlfast.optim`.

    Returns:
        A handle with ``remove()``, also a context manager.

    Raises:
        TypeError: `optimizer` is none of this library's.
        RuntimeError: `max_grad_norm` is set, which would need all gradients at once; the parameters are of a
            ``DistributedDataParallel``, also if they are wrapped between this call and the first backward; or,
            in backward, ``grad_scale`` or ``found_inf`` is set: a GradScaler decides after all gradients.

    Example:
        >>> import torch, dlfast.optim
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = dlfast.optim.SGD(model.parameters(), lr=0.1)
        >>> with dlfast.optim.step_in_backward(optimizer):
        ...     model(torch.ones(2, 3)).sum().backward()
        >>> model.weight.grad is None
        True

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources"
    (arXiv:2306.09782), which fuses the update into backward.
    """
    if not isinstance(optimizer, FusedStep):
        raise TypeError(f"optimizer must be one of dlfast.optim, got {type(optimizer).__name__}")
    _check(optimizer)
    return StepInBackward(optimizer)


def _check(optimizer: FusedStep) -> None:
    if optimizer.max_grad_norm is not None:
        raise RuntimeError("step_in_backward: max_grad_norm needs all gradients at once; use max_grad_value, or step()")
    for name in ("grad_scale", "found_inf"):
        if getattr(optimizer, name, None) is not None:
            raise RuntimeError(f"step_in_backward: {name} is known only after backward; use step()")


def _refuse_ddp(params: Iterable[Tensor]) -> None:
    # DDP marks neither parameters nor gradients, and its hooks live in C++: what finds it is a search for its
    # instances, once, and only in a program of several processes.
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    ddp = torch.nn.parallel.DistributedDataParallel
    ids = {id(p) for p in params}
    for model in (o for o in gc.get_objects() if ddp in type(o).__mro__):
        lists = (vars(model).get(name, ()) for name in ("_module_parameters", "_delay_all_reduce_params"))
        if any(id(p) in ids for reduced in lists for p in reduced):
            raise RuntimeError(
                "step_in_backward: the parameters are of a DistributedDataParallel, which averages gradients only "
                "after each of them was there: every process would step with its own; call step() after backward"
            )
