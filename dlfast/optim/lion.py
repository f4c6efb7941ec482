"""Lion with one fused step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlfast import reference
from dlfast.optim._options import check_betas, check_number
from dlfast.optim._step import FusedStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dlfast.optim._options import ExtraOptions


class Lion(FusedStep):
    r"""Lion, the evolved sign momentum.

    .. math::
        \theta &\leftarrow (1 - \gamma\lambda)\,\theta - \gamma\,\mathrm{sign}(\beta_1 m + (1 - \beta_1) g) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    Args:
        params: as for :class:`Adam`.
        lr (float or 1-element Tensor): learning rate :math:`\gamma`, some three to ten times smaller than AdamW's.
        betas (pair of floats or 1-element Tensors): :math:`\beta_1, \beta_2`, each in [0, 1).
        weight_decay (float or 1-element Tensor): :math:`\lambda`, decoupled; three to ten times AdamW's.
        maximize (bool): ascend instead.
        fused (bool, optional): False selects plain PyTorch, one tensor at a time; True leaves unscaling to the step
            under ``GradScaler``, as the extra options that need it do.
        **extra: what the step does beside the update; see :class:`Extras`.

    Raises:
        ValueError: an option is out of range or NaN, or `params` is empty.
        TypeError: `params` is a tensor or a set, or an option is no number or unknown.
        RuntimeError: a parameter is complex or overlaps itself in memory; at a step, a gradient is sparse.

    Example:
        >>> import torch, dlfast.optim
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = dlfast.optim.Lion([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.5000, -1.5000])

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), with its defaults.
    """

    _algorithm = "lion"
    _state_names = ("exp_avg",)
    _required = ("exp_avg",)
    _own_options = ("lr", "betas", "weight_decay")
    _foreign_options = ("eps",)
    _number_names = ("lr", "betas[0]", "betas[1]", "weight_decay", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize, "fused": fused}
        self._set_extras(dict(extra))
        self._check_options(defaults)
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> None:
        check_number("lr", options["lr"])
        check_betas(options["betas"])
        check_number("weight_decay", options["weight_decay"])

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (group["lr"], *group["betas"], group["weight_decay"], group["maximize"])

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._state_names

    def _plain(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, states: dict[str, Tensor], step: float
    ) -> None:
        reference.lion_step(
            param,
            grad,
            states["exp_avg"],
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
        )
