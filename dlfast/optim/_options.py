"""Checks of hyper-parameters, shared by all optimizers."""

from __future__ import annotations

import numbers
from typing import Any

from torch import Tensor


def check_number(name: str, value: Any, *, below: float | None = None) -> None:
    """Refuse `value` unless it is a number, or a tensor of one, in [0, `below`)."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a 1-element tensor, got shape {tuple(value.shape)}")
    elif not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a 1-element tensor, got {type(value).__name__}")
    number = float(value)
    # Written so that NaN fails too.
    if not (number >= 0 if below is None else 0 <= number < below):
        accepted = "at least 0" if below is None else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {accepted}, got {value}")


def check_engine(name: str, options: dict[str, Any]) -> None:
    """Refuse what ``torch.optim`` offers and a fused step cannot honour."""
    if options.get("differentiable"):
        raise RuntimeError(
            f"differentiable=True is not supported by dlfast.optim.{name}: its step runs in one fused kernel "
            f"that autograd cannot see through; use torch.optim.{name}"
        )
    if options.get("foreach"):
        raise RuntimeError(
            f"foreach=True chooses an implementation that dlfast.optim.{name} does not have: its step is "
            "always fused; leave foreach out (fused=False selects plain PyTorch, one tensor at a time)"
        )


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may share an address: each dimension must step over all smaller ones together."""
    if t.is_contiguous() or t.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
