"""Adam and AdamW with one fused step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlfast import reference
from dlfast.optim._options import check_betas, check_corrections, check_number
from dlfast.optim._step import FusedStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dlfast.optim._options import ExtraOptions


class _AdamStep(FusedStep):
    _algorithm = "adam"
    _state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _required = ("step", "exp_avg", "exp_avg_sq")
    _unsigned = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
    _own_options = ("lr", "betas", "eps", "weight_decay", "amsgrad")
    _number_names = ("lr", "betas[0]", "betas[1]", "eps", "weight_decay", "decoupled_weight_decay", "maximize")

    def _check_options(self, options: dict[str, Any]) -> None:
        check_number("lr", options["lr"])
        check_betas(options["betas"])
        check_number("eps", options["eps"])
        check_number("weight_decay", options["weight_decay"])
        self._check_amsgrad(options)

    def _check_numbers(self, group: dict[str, Any]) -> None:
        super()._check_numbers(group)
        check_corrections(group["betas"])
        self._check_amsgrad(group)

    def _check_amsgrad(self, options: dict[str, Any]) -> None:
        if options.get("amsgrad") and "_extras" in vars(self) and self._extras.state_dtype == "int8":
            raise ValueError("amsgrad keeps a maximum, which int8 states would let drift upwards; use one or the other")

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return (
            group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["decoupled_weight_decay"],
            group["maximize"],
        )  # fmt: skip

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._state_names if group["amsgrad"] else self._state_names[:2]

    def _plain(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, states: dict[str, Tensor], step: float
    ) -> None:
        reference.adam_step(
            param,
            grad,
            states["exp_avg"],
            states["exp_avg_sq"],
            states.get("max_exp_avg_sq"),
            step=step,
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )


class Adam(_AdamStep, torch.optim.Adam):
    r"""Adam: ``torch.optim.Adam`` in one native call.

    .. math::
        g &\leftarrow \pm\nabla f(\theta) + \lambda\theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \gamma\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
        params: parameters, named parameters or groups (dicts), as for ``torch.optim``. Any shape, layout and
            mixture of devices; float32, float64, bfloat16 or float16. 16-bit parameters are computed with in
            float32 and rounded once per step. Devices without a native step use plain PyTorch.
        lr (float or 1-element Tensor): learning rate :math:`\gamma`.
        betas (pair of floats): :math:`\beta_1, \beta_2`, each in [0, 1).
        eps (float): :math:`\epsilon`.
        weight_decay (float): :math:`\lambda`, an L2 penalty.
        amsgrad (bool): divide by the running maximum of :math:`v`.
        foreach: not supported; the step is always fused.
        maximize (bool): ascend instead.
        capturable (bool): refused at a step of CPU parameters. CUDA steps are counted on the device anyway.
        differentiable: not supported.
        fused (bool, optional): False selects plain PyTorch, one tensor at a time; True leaves unscaling to the step
            under ``GradScaler``, as the extra options that need it do.
        decoupled_weight_decay (bool): decay as :class:`AdamW` does.
        **extra: what the step does beside the update; see :class:`Extras`.

    Raises:
        ValueError: an option is out of range or NaN, or `params` is empty.
        TypeError: `params` is a tensor or a set, or an option is no number or unknown.
        RuntimeError: `foreach` or `differentiable` is set; a parameter is complex or overlaps itself in
            memory; at a step, a gradient is sparse.

    Example:
        >>> import torch, dlfast.optim
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = dlfast.optim.Adam([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000, 1.5000])

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization" (arXiv:1412.6980); Reddi et al.,
    "On the Convergence of Adam and Beyond" (2018) for amsgrad.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        self._set_extras(dict(extra))
        self._check_options({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad})
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class AdamW(_AdamStep, torch.optim.AdamW):
    r"""Adam with decoupled weight decay: ``torch.optim.AdamW`` in one native call.

    As :class:`Adam`, with :math:`\theta \leftarrow (1 - \gamma\lambda)\,\theta` in place of the penalty in
    the gradient. Arguments, dtypes and errors are those of :class:`Adam`.

    Example:
        >>> import torch, dlfast.optim
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = dlfast.optim.AdamW([weight], lr=0.5, weight_decay=0.2)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.4000, 1.3000])

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        self._set_extras(dict(extra))
        self._check_options({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad})
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
