"""Stochastic gradient descent with one fused step."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlfast import reference
from dlfast.optim._options import check_is_number, check_number, is_unknown, may_be_nonzero
from dlfast.optim._step import FusedStep

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dlfast.optim._options import ExtraOptions


class SGD(FusedStep, torch.optim.SGD):
    r"""Stochastic gradient descent, with momentum or without: ``torch.optim.SGD`` in one native call.

    .. math::
        g &\leftarrow \pm\nabla f(\theta) + \lambda\theta \\
        b &\leftarrow \mu b + (1 - \tau) g \quad (b \leftarrow g \text{ at the first step}) \\
        \theta &\leftarrow \theta - \gamma\, (b, \text{ or } g + \mu b \text{ with Nesterov})

    Args:
        params: parameters, named parameters or groups (dicts), as for ``torch.optim``. Any shape, layout and
            mixture of devices; float32, float64, bfloat16 or float16. 16-bit parameters are computed with in
            float32 and rounded once per step. Devices without a native step use plain PyTorch.
        lr (float or 1-element Tensor): learning rate :math:`\gamma`.
        momentum (float or 1-element Tensor): :math:`\mu`.
        dampening (float or 1-element Tensor): :math:`\tau`.
        weight_decay (float or 1-element Tensor): :math:`\lambda`, an L2 penalty.
        nesterov (bool): needs a momentum and no dampening.
        maximize (bool): ascend instead.
        foreach: not supported; the step is always fused.
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
        >>> optimizer = dlfast.optim.SGD([weight], lr=0.5, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0., 0.])

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013), in
    the form documented for ``torch.optim.SGD``.
    """

    _algorithm = "sgd"
    _state_names = ("momentum_buffer",)
    _counts_steps = False
    _own_options = ("lr", "momentum", "dampening")
    _foreign_options = ("wd_ratio",)  # of SGDP
    _number_names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extra: Unpack[ExtraOptions],
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        self._set_extras(dict(extra))
        self._check_options({**options, "nesterov": nesterov})
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _check_options(self, options: dict[str, Any]) -> None:
        check_number("lr", options["lr"])
        check_number("momentum", options["momentum"])
        check_number("weight_decay", options["weight_decay"])
        momentum, dampening = options["momentum"], options["dampening"]
        check_is_number("dampening", dampening)
        if not is_unknown(dampening) and dampening != dampening:
            raise ValueError("dampening must be a number, got nan")
        is_damped = not is_unknown(dampening) and dampening != 0
        if options["nesterov"] and (is_damped or not may_be_nonzero(momentum)):
            raise ValueError(
                f"nesterov needs a momentum above 0 and dampening 0, got momentum={momentum}, dampening={dampening}"
            )

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (
            group["lr"], group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"],
            group["maximize"],
        )  # fmt: skip

    def _unused(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if may_be_nonzero(group["momentum"]) else ("dampening",)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if may_be_nonzero(group["momentum"]) else ()

    # How many steps each momentum buffer has taken: the first gradient enters undamped. torch's state_dict has
    # no place for it, and needs none: a buffer in it has taken a step.
    def _counter(self, p: Tensor, entry: dict[str, Any], group: dict[str, Any], device: torch.device) -> Tensor | None:
        if not may_be_nonzero(group["momentum"]):
            return None
        counters = self._counters()
        step = counters.get(p)
        if entry.get("momentum_buffer") is None:
            step = counters[p] = torch.zeros((), dtype=torch.float32, device=device)
        elif step is None or step.device != device:
            step = counters[p] = torch.ones((), dtype=torch.float32, device=device)
        return step

    def _counters(self) -> dict[Tensor, Tensor]:
        counters: dict[Tensor, Tensor] = vars(self).setdefault("_momentum_steps", {})
        return counters

    def _beside_states(self) -> dict[Any, Tensor]:
        return {**super()._beside_states(), **{("momentum_step", p): t for p, t in self._counters().items()}}

    def _plain(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, states: dict[str, Tensor], step: float
    ) -> None:
        reference.sgd_step(
            param,
            grad,
            states.get("momentum_buffer"),
            first=step <= 1,
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )

    def _saved_entry(self, p: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """Without a buffer made for a step that only the device knew to be skipped.

        A captured graph goes on writing it: the optimizer itself has to keep it.
        """
        step = self._counters().get(p)
        if step is None or step.item() != 0:
            return entry
        return {n: value for n, value in entry.items() if n not in ("momentum_buffer", "momentum_buffer_scale")}

    def __getstate__(self) -> dict[str, Any]:
        result = super().__getstate__()
        state: defaultdict[Any, Any] = defaultdict(dict)
        for p, entry in self.state.items():
            kept = self._saved_entry(p, entry) if isinstance(p, Tensor) and isinstance(entry, dict) else entry
            if kept or not entry:
                state[p] = kept
        return {**result, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).pop("_momentum_steps", None)
