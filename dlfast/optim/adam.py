"""Adam and AdamW with one fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from dlfast import reference
from dlfast.optim._options import check_number
from dlfast.optim._step import Bucket, FusedStep


class _AdamStep(FusedStep):
    _state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _own_options = ("lr", "betas", "eps", "weight_decay", "amsgrad")

    def _check_options(self, options: dict[str, Any]) -> None:
        check_number("lr", options["lr"])
        betas = options["betas"]
        if len(betas) != 2:
            raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
        check_number("betas[0]", betas[0], below=1)
        check_number("betas[1]", betas[1], below=1)
        check_number("eps", options["eps"])
        check_number("weight_decay", options["weight_decay"])

    def _states(self, bucket: Bucket) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """exp_avg, exp_avg_sq, max_exp_avg_sq (of groups with amsgrad) and step; made where missing."""
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = [], [], [], []
        for p, index in zip(bucket.params, bucket.groups, strict=True):
            state = self.state[p]
            amsgrad = self.param_groups[index]["amsgrad"]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=_step_device(p, bucket))
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if amsgrad:
                if "max_exp_avg_sq" not in state:
                    state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                max_exp_avg_sqs.append(state["max_exp_avg_sq"])
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            steps.append(state["step"])
        if bucket.native and bucket.device.type == "cuda":
            # Loaded or plain states may count on the CPU.
            for i, step in enumerate(steps):
                if not step.is_cuda:
                    steps[i] = self.state[bucket.params[i]]["step"] = step.to(bucket.device, torch.float32)
        return exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps

    def _native_step(self, bucket: Bucket, lr: list[float], lr_tensors: list[Tensor], scalars: dict[str, Any]) -> None:
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = self._states(bucket)
        groups = self.param_groups
        torch.ops.dlfast._adam_step_.default(
            bucket.params,
            bucket.grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            bucket.groups,
            lr=lr,
            lr_tensors=lr_tensors,
            beta1=[float(g["betas"][0]) for g in groups],
            beta2=[float(g["betas"][1]) for g in groups],
            eps=[float(g["eps"]) for g in groups],
            weight_decay=[float(g["weight_decay"]) for g in groups],
            amsgrad=[g["amsgrad"] for g in groups],
            decoupled_weight_decay=[g["decoupled_weight_decay"] for g in groups],
            maximize=[g["maximize"] for g in groups],
            **scalars,
        )

    def _plain_step(self, bucket: Bucket, grad_scale: float) -> None:
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = self._states(bucket)
        lr, _ = self._learning_rates(torch.device("cpu"))
        maxima = iter(max_exp_avg_sqs)
        for i, (p, index) in enumerate(zip(bucket.params, bucket.groups, strict=True)):
            group = self.param_groups[index]
            steps[i] += 1
            reference.adam_step(
                p,
                bucket.grads[i],
                exp_avgs[i],
                exp_avg_sqs[i],
                next(maxima) if group["amsgrad"] else None,
                step=steps[i].item(),
                lr=lr[index],
                beta1=float(group["betas"][0]),
                beta2=float(group["betas"][1]),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                decoupled_weight_decay=group["decoupled_weight_decay"],
                maximize=group["maximize"],
                grad_scale=grad_scale,
            )

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of ``torch.optim``: `step` on the CPU unless `fused` or `capturable`.

        On CUDA this waits for the device; during training `step` lives there.
        """
        result = super().state_dict()
        for group in result["param_groups"]:
            if group["fused"] or group["capturable"]:
                continue
            for i in group["params"]:
                entry = result["state"].get(i)
                if entry and isinstance(entry.get("step"), Tensor) and entry["step"].device.type != "cpu":
                    result["state"][i] = {**entry, "step": entry["step"].cpu()}
        return result


def _step_device(p: Tensor, bucket: Bucket) -> torch.device:
    """Where a step is counted: beside the parameter if native, so that a skipped step needs no host."""
    return p.device if bucket.native else torch.device("cpu")


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
        lr (float or 1-element Tensor): learning rate :math:`\gamma`. A tensor on the GPU is read there.
        betas (pair of floats): :math:`\beta_1, \beta_2`, each in [0, 1).
        eps (float): :math:`\epsilon`.
        weight_decay (float): :math:`\lambda`, an L2 penalty.
        amsgrad (bool): divide by the running maximum of :math:`v`.
        foreach: not supported; the step is always fused.
        maximize (bool): ascend instead.
        capturable (bool): refused at a step of CPU parameters. CUDA steps are counted on the device anyway.
        differentiable: not supported.
        fused (bool, optional): False selects plain PyTorch, one tensor at a time; None and True are the same.
        decoupled_weight_decay (bool): decay as :class:`AdamW` does.

    Raises:
        ValueError: an option is out of range or NaN, or `params` is empty.
        TypeError: `params` is a tensor or a set, or an option is no number.
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
    ) -> None:
        self._check_options({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
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
    ) -> None:
        self._check_options({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
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
