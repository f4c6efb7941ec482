"""Adagrad with one fused step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlfast import reference
from dlfast.optim._options import check_number
from dlfast.optim._step import FusedStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dlfast.optim._options import ExtraOptions


class Adagrad(FusedStep, torch.optim.Adagrad):
    r"""Adagrad: ``torch.optim.Adagrad`` in one native call.

    .. math::
        g &\leftarrow \pm\nabla f(\theta) + \lambda\theta, \quad s \leftarrow s + g^2 \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 + (t - 1)\eta}\, \frac{g}{\sqrt{s} + \epsilon}

    Args:
        params: as for :class:`Adam`.
        lr (float or 1-element Tensor): learning rate :math:`\gamma`.
        lr_decay (float or 1-element Tensor): :math:`\eta`.
        weight_decay (float or 1-element Tensor): :math:`\lambda`, an L2 penalty.
        initial_accumulator_value (float): :math:`s` before the first step.
        eps (float or 1-element Tensor): :math:`\epsilon`.
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
        >>> optimizer = dlfast.optim.Adagrad([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000, 1.5000])

    Source: Duchi et al., "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization"
    (2011), as documented for ``torch.optim.Adagrad``.
    """

    _algorithm = "adagrad"
    _state_names = ("sum",)
    _required = ("step", "sum")
    _unsigned = frozenset({"sum"})
    _own_options = ("lr", "lr_decay", "initial_accumulator_value")
    _number_names = ("lr", "lr_decay", "eps", "weight_decay", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        self._set_extras(dict(extra))
        self._check_options(
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
            }
        )
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        if fused is not False:
            # torch before 2.14 counts on the CPU, and bringing that to a GPU at the first step would wait for it.
            for p, state in self.state.items():
                if state["step"].device != p.device:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if self._extras.state_dtype is not None:
            # torch has made the sums, in the parameters' dtype; ours are made at the first step.
            self.state.clear()

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            check_number(name, options[name])

    def _initial(self, group: dict[str, Any], name: str) -> float:
        # Not the group's, as in torch.optim.
        return float(self.defaults["initial_accumulator_value"])

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (group["lr"], group["lr_decay"], group["eps"], group["weight_decay"], group["maximize"])

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._state_names

    def _plain(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, states: dict[str, Tensor], step: float
    ) -> None:
        reference.adagrad_step(
            param,
            grad,
            states["sum"],
            step=step,
            lr=float(group["lr"]),
            lr_decay=float(group["lr_decay"]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
        )
