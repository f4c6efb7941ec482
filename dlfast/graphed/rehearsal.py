"""A step that looks for what a CUDA graph cannot hold, and says in which line of whose code it is.

Capture itself would fail at the first of these with an error of CUDA, or at its end without a line; numbers that
a step takes from tensors on the CPU it would keep forever.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

# A line in these is not the user's.
LIBRARIES = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/")


class _Hindrance(RuntimeError):
    """What a graph cannot hold, in a few words."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if _waits(func, args, given):
            raise _Hindrance(f"waits for the device ({func})")
        output = func(*args, **kwargs)
        made = [t for t in _pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if any(t.device.type == "cpu" for t in made) or any(map(_is_value, given)):
            raise _Hindrance(f"computes with a tensor on the CPU ({func})")
        return output


def _waits(func: Any, args: Any, given: list[Tensor]) -> bool:
    if not any(t.is_cuda for t in given):
        return False
    if func is torch.ops.aten.index.Tensor:  # of integers the shape is known, of a mask it is not
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _is_value(t: Tensor) -> bool:
    """Whether `t` is on the CPU and somebody's, not a number that PyTorch has wrapped: these give way in dtype."""
    if t.device.type != "cpu":
        return False
    if t.dim() > 0 or t.dtype not in (torch.float64, torch.int64, torch.bool, torch.complex128):
        return True
    smaller = {torch.float64: torch.float32, torch.int64: torch.int32, torch.complex128: torch.complex64}
    return t.dtype in smaller and torch.result_type(t, torch.zeros((), dtype=smaller[t.dtype])) is t.dtype


@contextmanager
def looking() -> Iterator[None]:
    """Within, what a graph cannot hold raises; the optimizer's step is left to :func:`waiting_raises`."""
    with _Watch():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def waiting_raises() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # that it misses some: capture does not
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def refusal(error: BaseException, stage: str) -> RuntimeError:
    """The error that says where `error` came from while a step was at `stage`."""
    what = str(error) if isinstance(error, _Hindrance) else f"fails: {str(error).partition(chr(10))[0]}"
    where = f"in {stage}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*LIBRARIES, "<"))]
    if frames:
        last = frames[-1]
        where = f"{last.filename}, line {last.lineno}, in {stage}"
        what += f": {last.line}"
    elif stage == "backward":
        what += " (a loss of an earlier step, if it is still alive, ties gradients to its stream: delete it)"
    return RuntimeError(f"the step cannot be captured in a CUDA graph: {where}, {what}")
