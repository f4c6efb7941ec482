"""LAMB with one fused step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlfast import reference
from dlfast.optim._options import check_betas, check_corrections, check_number
from dlfast.optim._step import FusedStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dlfast.optim._options import ExtraOptions


class LAMB(FusedStep):
    r"""LAMB: Adam whose step on each tensor is scaled to the norm of that tensor, for large batches.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        r &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda\theta \\
        \theta &\leftarrow \theta - \gamma\, \frac{\lVert\theta\rVert}{\lVert r\rVert}\, r

    The quotient is 1 where either norm is 0.

    Args:
        params: as for :class:`Adam`. DTensors are not supported.
        lr (float or 1-element Tensor): learning rate :math:`\gamma`.
        betas (pair of floats or 1-element Tensors): :math:`\beta_1, \beta_2`, each in [0, 1).
        eps (float or 1-element Tensor): :math:`\epsilon`.
        weight_decay (float or 1-element Tensor): :math:`\lambda`.
        maximize (bool): ascend instead.
        fused (bool, optional): False selects plain PyTorch, one tensor at a time; True leaves unscaling to the step
            under ``GradScaler``, as the extra options that need it do.
        **extra: what the step does beside the update; see :class:`Extras`.

    Raises:
        ValueError: an option is out of range or NaN, or `params` is empty.
        TypeError: `params` is a tensor or a set, or an option is no number or unknown.
        RuntimeError: a parameter is complex or overlaps itself in memory; at a step, a gradient is sparse or a
            parameter is a DTensor.

    Example:
        >>> import torch, dlfast.optim
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = dlfast.optim.LAMB([weight], lr=0.1, weight_decay=0.0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([2.6464, 3.6464])

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
    (arXiv:1904.00962), algorithm 2 with bias correction and its defaults.
    """

    _algorithm = "lamb"
    _state_names = ("exp_avg", "exp_avg_sq")
    _required = ("step", "exp_avg", "exp_avg_sq")
    _unsigned = frozenset({"exp_avg_sq"})
    _own_options = ("lr", "betas", "eps", "weight_decay")
    # Of Adam; RAdam and NAdam, and NAdam as it was; MARS; Muon, which steps some parameters as AdamW does.
    _foreign_options = ("amsgrad", "decoupled_weight_decay", "schedule_decay", "mars_type", "ns_steps")
    _number_names = ("lr", "betas[0]", "betas[1]", "eps", "weight_decay", "maximize")
    _needs_whole_tensors = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-6,
        weight_decay: float | Tensor = 1e-2,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize, "fused": fused,
        }  # fmt: skip
        self._set_extras(dict(extra))
        self._check_options(defaults)
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> None:
        check_number("lr", options["lr"])
        check_betas(options["betas"])
        check_number("eps", options["eps"])
        check_number("weight_decay", options["weight_decay"])

    def _check_numbers(self, group: dict[str, Any]) -> None:
        super()._check_numbers(group)
        check_corrections(group["betas"])

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["maximize"])

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._state_names

    def _plain(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, states: dict[str, Tensor], step: float
    ) -> None:
        reference.lamb_step(
            param,
            grad,
            states["exp_avg"],
            states["exp_avg_sq"],
            step=step,
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=group["maximize"],
        )
