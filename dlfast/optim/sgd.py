"""Stochastic gradient descent with one fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from dlfast import reference
from dlfast.optim._options import check_number
from dlfast.optim._step import Bucket, FusedStep


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
        lr (float or 1-element Tensor): learning rate :math:`\gamma`. A tensor on the GPU is read there.
        momentum (float): :math:`\mu`.
        dampening (float): :math:`\tau`.
        weight_decay (float): :math:`\lambda`, an L2 penalty.
        nesterov (bool): needs a momentum and no dampening.
        maximize (bool): ascend instead.
        foreach: not supported; the step is always fused.
        differentiable: not supported.
        fused (bool, optional): False selects plain PyTorch, one tensor at a time; None and True are the same.

    Raises:
        ValueError: an option is out of range or NaN, or `params` is empty.
        TypeError: `params` is a tensor or a set, or an option is no number.
        RuntimeError: `foreach` or `differentiable` is set; a parameter is complex or overlaps itself in
            memory; at a step, a gradient is sparse.

    A step that ``GradScaler`` skips changes nothing: on CUDA, where the host does not know of it, a momentum
    buffer made for a skipped first step holds zeros and is left out of :meth:`state_dict`.

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

    _state_names = ("momentum_buffer",)
    _own_options = ("lr", "momentum")

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
    ) -> None:
        self._check_options(
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            }
        )
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
        dampening = float(options["dampening"])
        if dampening != dampening:
            raise ValueError("dampening must be a number, got nan")
        if options["nesterov"] and (options["momentum"] <= 0 or dampening != 0):
            raise ValueError(
                "nesterov needs a momentum above 0 and dampening 0, got "
                f"momentum={options['momentum']}, dampening={options['dampening']}"
            )

    # How many steps each momentum buffer has taken, on the parameter's device: the first gradient enters
    # undamped, and only the device knows whether a step with found_inf was taken.
    def _counters(self) -> dict[Tensor, Tensor]:
        counters: dict[Tensor, Tensor] = vars(self).setdefault("_momentum_steps", {})
        return counters

    def _buffers(self, bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
        """Buffers and counters of the parameters whose group has momentum, made where missing."""
        buffers, steps = [], []
        counters = self._counters()
        for p, index in zip(bucket.params, bucket.groups, strict=True):
            if self.param_groups[index]["momentum"] == 0:
                continue
            state = self.state[p]
            buffer = state.get("momentum_buffer")
            step = counters.get(p)
            if buffer is None:
                buffer = state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                step = counters[p] = torch.zeros((), dtype=torch.float32, device=p.device)
            elif step is None or step.device != p.device:
                step = counters[p] = torch.ones((), dtype=torch.float32, device=p.device)
            buffers.append(buffer)
            steps.append(step)
        return buffers, steps

    def _native_step(self, bucket: Bucket, lr: list[float], lr_tensors: list[Tensor], scalars: dict[str, Any]) -> None:
        buffers, steps = self._buffers(bucket)
        groups = self.param_groups
        torch.ops.dlfast._sgd_step_.default(
            bucket.params,
            bucket.grads,
            buffers,
            steps,
            bucket.groups,
            lr=lr,
            lr_tensors=lr_tensors,
            momentum=[float(g["momentum"]) for g in groups],
            dampening=[float(g["dampening"]) for g in groups],
            weight_decay=[float(g["weight_decay"]) for g in groups],
            nesterov=[g["nesterov"] for g in groups],
            maximize=[g["maximize"] for g in groups],
            **scalars,
        )

    def _plain_step(self, bucket: Bucket, grad_scale: float) -> None:
        buffers, steps = self._buffers(bucket)
        lr, _ = self._learning_rates(torch.device("cpu"))
        slots = iter(zip(buffers, steps, strict=True))
        for p, grad, index in zip(bucket.params, bucket.grads, bucket.groups, strict=True):
            group = self.param_groups[index]
            buffer, step = next(slots) if group["momentum"] != 0 else (None, None)
            reference.sgd_step(
                p,
                grad,
                buffer,
                first=step is not None and step.item() == 0,
                lr=lr[index],
                momentum=float(group["momentum"]),
                dampening=float(group["dampening"]),
                weight_decay=float(group["weight_decay"]),
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                grad_scale=grad_scale,
            )
            if step is not None:
                step += 1

    def _forget_unstarted(self) -> None:
        counters = self._counters()
        if not counters:
            return
        for p, step in list(counters.items()):
            if step.item() != 0:
                continue
            del counters[p]
            self.state[p].pop("momentum_buffer", None)
            if not self.state[p]:
                del self.state[p]

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of ``torch.optim.SGD``."""
        self._forget_unstarted()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._forget_unstarted()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).pop("_momentum_steps", None)
