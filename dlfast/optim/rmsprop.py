"""RMSprop with one fused step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlfast import reference
from dlfast.optim._options import check_number, is_unknown
from dlfast.optim._step import FusedStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dlfast.optim._options import ExtraOptions


class RMSprop(FusedStep, torch.optim.RMSprop):
    r"""RMSprop: ``torch.optim.RMSprop`` in one native call.

    .. math::
        g &\leftarrow \pm\nabla f(\theta) + \lambda\theta, \quad v \leftarrow \alpha v + (1 - \alpha) g^2 \\
        u &= g / (\sqrt{v - \bar{g}^2} + \epsilon), \quad \bar{g} \leftarrow \alpha\bar{g} + (1 - \alpha) g
            \text{ if centered, else } 0 \\
        \theta &\leftarrow \theta - \gamma b, \quad b \leftarrow \mu b + u

    Args:
        params: as for :class:`Adam`.
        lr (float or 1-element Tensor): learning rate :math:`\gamma`.
        alpha (float or 1-element Tensor): :math:`\alpha`, in [0, 1).
        eps (float or 1-element Tensor): :math:`\epsilon`.
        weight_decay (float or 1-element Tensor): :math:`\lambda`, an L2 penalty.
        momentum (float or 1-element Tensor): :math:`\mu`.
        centered (bool): divide by the standard deviation instead.
        capturable (bool): refused at a step of CPU parameters.
        foreach: not supported; the step is always fused.
        maximize (bool): ascend instead.
        differentiable: not supported.
        fused (bool, optional): False selects plain PyTorch, one tensor at a time; True leaves unscaling to the step
            under ``GradScaler``, as the extra options that need it do.
        **extra: what the step does beside the update; see :class:`Extras`.

    Raises:
        ValueError: an option is out of range or NaN, or `params` is empty.
        TypeError: `params` is a tensor or a set, or an option is no number or unknown.
        RuntimeError: `foreach` or `differentiable` is set; a parameter is complex or overlaps itself in
            memory; at a step, a gradient is sparse.

    Example:
        >>> import torch, dlfast.optim
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = dlfast.optim.RMSprop([weight], lr=0.05, alpha=0.75)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.9000])

    Source: Tieleman and Hinton, lecture 6.5 of "Neural Networks for Machine Learning" (2012); Graves (2013)
    for the centered form, as documented for ``torch.optim.RMSprop``.
    """

    _algorithm = "rmsprop"
    _state_names = ("square_avg", "grad_avg", "momentum_buffer")
    _required = ("step", "square_avg")
    _unsigned = frozenset({"square_avg"})
    _own_options = ("lr", "alpha", "centered", "momentum")
    _number_names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        self._set_extras(dict(extra))
        self._check_options({"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum})
        # torch has no such option of this algorithm: it is none of its groups'.
        self._fused = fused
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            # torch refuses it without a GPU; so do we, at the step, by the parameters there.
            capturable,
            foreach,
            maximize,
            differentiable,
        )

    def _check_options(self, options: dict[str, Any]) -> None:
        check_number("lr", options["lr"])
        check_number("alpha", options["alpha"], below=1)
        check_number("eps", options["eps"])
        check_number("weight_decay", options["weight_decay"])
        check_number("momentum", options["momentum"])

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (
            group["lr"], group["alpha"], group["eps"], group["weight_decay"], group["momentum"], group["centered"],
            group["maximize"],
        )  # fmt: skip

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        kept = (True, group["centered"], _has_momentum(group))
        return tuple(name for name, is_kept in zip(self._state_names, kept, strict=True) if is_kept)

    def _unused(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if _has_momentum(group) else ("momentum",)

    def _plain(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, states: dict[str, Tensor], step: float
    ) -> None:
        reference.rmsprop_step(
            param,
            grad,
            states["square_avg"],
            states.get("grad_avg"),
            states.get("momentum_buffer"),
            lr=float(group["lr"]),
            alpha=float(group["alpha"]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            maximize=group["maximize"],
        )


def _has_momentum(group: dict[str, Any]) -> bool:
    """Whether there is a momentum buffer, as far as is known: as in torch.optim, not for one that turned negative."""
    momentum = group["momentum"]
    return is_unknown(momentum) or bool(momentum > 0)
