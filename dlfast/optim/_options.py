"""Options that all optimizers share, and the checks of hyper-parameters."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dlfast.optim._zero import refuse_clearing

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class ExtraOptions(TypedDict, total=False):
        """The keyword arguments of :class:`Extras`, as every optimizer takes them."""

        max_grad_norm: float | None
        max_grad_value: float | None
        ema_decay: float | None
        state_dtype: torch.dtype | Literal["int8"] | None
        master_weights: bool
        stochastic_rounding: bool
        zero_grad_after_step: bool


@dataclass
class Extras:
    """What a step does beside its update; every optimizer takes these as keyword arguments.

    Args:
        max_grad_norm: gradients are scaled so that their common L2 norm, over all groups, is at most this, as
            by ``torch.nn.utils.clip_grad_norm_``; ``float("inf")`` only measures. The norm is then in
            ``optimizer.grad_norm``.
        max_grad_value: gradients are clipped to [-value, value], before the norm is taken.
        ema_decay: keep a moving average of the weights, ``ema = decay * ema + (1 - decay) * weight``, in
            float32 (float64 of float64). It starts as a copy of the weights before the first step with a
            gradient of theirs, and moves with every further step, with or without one.
        state_dtype: number format of the states of float32 and 16-bit parameters: ``torch.float32``;
            ``torch.bfloat16``, rounded stochastically; ``"int8"``, one byte per number and a float32 scale per
            256 numbers; None keeps the parameter's own dtype.
        master_weights: 16-bit parameters are updated in float32, of which they are the rounded value. For
            bfloat16 only the lower halves of the float32 numbers are kept beside the parameters; for float16 the
            whole numbers are, which the next step writes over whatever else was written to a parameter.
        stochastic_rounding: 16-bit parameters are rounded up or down at random, in proportion, so that small
            updates are not lost. The random numbers follow from ``torch.initial_seed()`` at construction.
        zero_grad_after_step: gradients are set to zero once they were used, also by a skipped step.

    Raises:
        ValueError: a number is out of range or NaN, `state_dtype` is none of these, or both `master_weights`
            and `stochastic_rounding` are asked for.
        TypeError: a value has the wrong type (a tensor among them), or a keyword is unknown.

    >>> Extras(ema_decay=1.5)
    Traceback (most recent call last):
        ...
    ValueError: ema_decay must be in [0, 1), got 1.5
    """

    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    ema_decay: float | None = None
    state_dtype: torch.dtype | Literal["int8"] | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    zero_grad_after_step: bool = False

    def __post_init__(self) -> None:
        self.changed = True  # since a step last looked
        for name in ("max_grad_norm", "max_grad_value", "ema_decay"):
            self.check_changed(name, getattr(self, name))
        if self.state_dtype not in (None, torch.float32, torch.bfloat16, "int8"):
            raise ValueError(
                f"state_dtype must be torch.float32, torch.bfloat16, 'int8' or None, got {self.state_dtype!r}"
            )
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "master_weights and stochastic_rounding exclude each other: masters keep what rounding loses"
            )

    @property
    def rounds_states(self) -> bool:
        """Whether states are rounded at random."""
        return self.state_dtype in (torch.bfloat16, "int8")

    @property
    def draws(self) -> bool:
        """Whether a step draws random numbers."""
        return self.stochastic_rounding or self.rounds_states

    @staticmethod
    def check_changed(name: str, value: Any) -> None:
        if name not in CHANGEABLE:
            raise AttributeError(f"{name} is chosen when the optimizer is made and cannot be changed")
        if value is not None and name != "zero_grad_after_step":
            if isinstance(value, Tensor):
                raise TypeError(
                    f"{name} must be a number, got a tensor: what is written to it later would not be seen; "
                    f"set optimizer.{name} instead"
                )
            check_number(name, value, below=1 if name == "ema_decay" else None)


def extra_option(name: str) -> Any:
    """An attribute of an optimizer that reads and, where that may be, sets one of its :class:`Extras`."""

    def get(optimizer: Any) -> Any:
        return getattr(optimizer._extras, name)

    def set(optimizer: Any, value: Any) -> None:
        Extras.check_changed(name, value)
        if name == "ema_decay" and (value is None) != (optimizer._extras.ema_decay is None):
            raise AttributeError("ema_decay can be changed, but not switched on or off after construction")
        if name == "zero_grad_after_step" and value and optimizer._shards is not None:
            refuse_clearing()
        setattr(optimizer._extras, name, value)
        optimizer._extras.changed = True

    return property(get, set)


# Options of groups that are true or false, whatever their type.
FLAGS = ("nesterov", "centered", "decoupled_weight_decay", "maximize")
# Types of numbers that need no closer look.
PLAIN = frozenset((float, int, bool))
# What may be set on an optimizer between steps; the others decide which states there are.
CHANGEABLE = ("max_grad_norm", "max_grad_value", "ema_decay", "zero_grad_after_step")


def is_unknown(value: Any) -> bool:
    """Whether only a device knows the number: to look at it would wait, and is refused under capture."""
    return isinstance(value, Tensor) and value.is_cuda


def may_be_nonzero(value: Any) -> bool:
    """Whether a step has to reckon with a number other than 0."""
    return is_unknown(value) or bool(value != 0)


def check_is_number(name: str, value: Any) -> None:
    """Refuse `value` unless it is a number, of NumPy perhaps, or a tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a 1-element tensor, got shape {tuple(value.shape)}")
    elif not isinstance(value, numbers.Real) and getattr(value, "ndim", None) != 0:
        raise TypeError(f"{name} must be a number or a 1-element tensor, got {type(value).__name__}")


def check_number(name: str, value: Any, *, below: float | None = None) -> None:
    """Refuse `value` unless it is a number, or a tensor of one, in [0, `below`)."""
    check_is_number(name, value)
    if is_unknown(value):
        return
    number = float(value)
    # Written so that NaN fails too.
    if not (number >= 0 if below is None else 0 <= number < below):
        accepted = "at least 0" if below is None else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {accepted}, got {value}")


def check_set(name: str, value: Any) -> None:
    """Refuse a number that was set in a group after it was added, where no step could use it.

    Any other is used as ``torch.optim`` uses it: schedulers end a little below 0. NaN would make every parameter
    NaN at once, or, as a momentum, at the second step.
    """
    check_is_number(name, value)
    if not is_unknown(value) and value != value:
        raise ValueError(f"{name} must be a number other than NaN, got {value}")


def check_corrections(betas: Any) -> None:
    """Refuse betas, set after their group was added, for which a bias correction is no number.

    ``torch.optim`` divides by 0 there, or goes on with complex numbers and fails.
    """
    beta1, beta2 = betas
    if not is_unknown(beta1) and beta1 == 1:
        raise ValueError("betas[0] must not be 1: its bias correction would divide by 0")
    if not is_unknown(beta2) and abs(beta2) > 1:
        raise ValueError(f"betas[1] must be in [-1, 1] for its bias correction, got {beta2}")


def check_betas(betas: Any) -> None:
    if len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    check_number("betas[0]", betas[0], below=1)
    check_number("betas[1]", betas[1], below=1)


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
