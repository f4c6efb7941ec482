"""What each operator means, in plain PyTorch.

This is the specification: the fallback where no compiled extension is there, the oracle of the tests and
the baseline of the benchmarks. It is differentiable by PyTorch's own autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_relu_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
    pool: str | None = "max",
    pool_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """Convolution, then `activation`, then pooling; see :func:`dlfast.conv_relu_pool2d`."""
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return relu_pool2d(
        output,
        activation=activation,
        pool=pool,
        pool_size=pool_size,
        pool_stride=pool_stride,
        pool_padding=pool_padding,
        ceil_mode=ceil_mode,
    )


def relu_pool2d(
    input: Tensor,
    *,
    activation: str | None = "relu",
    pool: str | None = "max",
    pool_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """`activation`, then pooling, of `input`: the part after the convolution."""
    if activation == "relu":
        input = F.relu(input)
    elif activation is not None:
        raise ValueError(f"activation must be 'relu' or None, got {activation!r}")
    if pool == "max":
        return F.max_pool2d(input, pool_size, pool_stride, pool_padding, 1, ceil_mode)  # type: ignore[arg-type]
    if pool == "avg":
        return F.avg_pool2d(input, pool_size, pool_stride, pool_padding, ceil_mode)  # type: ignore[arg-type]
    if pool is not None:
        raise ValueError(f"pool must be 'max', 'avg' or None, got {pool!r}")
    return input


def batch_norm_relu_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    pool: str | None = "max",
    pool_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """Batch normalisation, then `activation`, then pooling; see :func:`dlfast.nn.batch_norm_relu_pool2d`."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return relu_pool2d(
        output,
        activation=activation,
        pool=pool,
        pool_size=pool_size,
        pool_stride=pool_stride,
        pool_padding=pool_padding,
        ceil_mode=ceil_mode,
    )


# ---- Optimizer steps: one tensor, in place ----------------------------------------------------------------
# 16-bit parameters are read into float32, computed with in float32, and rounded once when written; so are
# their states. float32 and float64 compute in themselves.


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@torch.no_grad()
def sgd_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    first: bool,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One step of :class:`dlfast.optim.SGD`; `momentum_buffer` is None where `momentum` is 0.

    The `first` gradient enters the buffer undamped.
    """
    real = _compute_dtype(param.dtype)
    p = param.to(real)
    g = grad.to(real) * ((-1.0 if maximize else 1.0) / grad_scale)
    if weight_decay != 0:
        g = g + weight_decay * p
    if momentum_buffer is not None:
        buffer = g if first else momentum * momentum_buffer.to(real) + (1 - dampening) * g
        momentum_buffer.copy_(buffer)
        g = g + momentum * buffer if nesterov else buffer
    param.copy_(p - lr * g)


@torch.no_grad()
def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """Step number `step` (1 for the first) of :class:`dlfast.optim.Adam`, or AdamW if decoupled.

    `max_exp_avg_sq` is None without amsgrad.
    """
    real = _compute_dtype(param.dtype)
    p = param.to(real)
    g = grad.to(real) * ((-1.0 if maximize else 1.0) / grad_scale)
    if weight_decay != 0 and decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    elif weight_decay != 0:
        g = g + weight_decay * p
    m = beta1 * exp_avg.to(real) + (1 - beta1) * g
    v = second = beta2 * exp_avg_sq.to(real) + (1 - beta2) * g * g
    if max_exp_avg_sq is not None:
        second = torch.maximum(max_exp_avg_sq.to(real), v)
        max_exp_avg_sq.copy_(second)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    denominator = second.sqrt() / (1 - beta2**step) ** 0.5 + eps
    param.copy_(p - (lr / (1 - beta1**step)) * m / denominator)


@torch.no_grad()
def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step of :class:`dlfast.optim.Lion`."""
    real = _compute_dtype(param.dtype)
    p, m = param.to(real), exp_avg.to(real)
    g = -grad.to(real) if maximize else grad.to(real)
    direction = (beta1 * m + (1 - beta1) * g).sign()
    param.copy_(p * (1 - lr * weight_decay) - lr * direction)
    exp_avg.copy_(beta2 * m + (1 - beta2) * g)


@torch.no_grad()
def rmsprop_step(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step of :class:`dlfast.optim.RMSprop`; `grad_avg` is there where it is centered."""
    real = _compute_dtype(param.dtype)
    p = param.to(real)
    g = -grad.to(real) if maximize else grad.to(real)
    if weight_decay != 0:
        g = g + weight_decay * p
    v = second = alpha * square_avg.to(real) + (1 - alpha) * g * g
    square_avg.copy_(v)
    if grad_avg is not None:
        mean = alpha * grad_avg.to(real) + (1 - alpha) * g
        grad_avg.copy_(mean)
        second = (v - mean * mean).clamp(min=0)
    update = g / (second.sqrt() + eps)
    if momentum_buffer is not None:
        update = momentum * momentum_buffer.to(real) + update
        momentum_buffer.copy_(update)
    param.copy_(p - lr * update)


@torch.no_grad()
def adagrad_step(
    param: Tensor,
    grad: Tensor,
    sum: Tensor,
    *,
    step: float,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Step number `step` (1 for the first) of :class:`dlfast.optim.Adagrad`."""
    real = _compute_dtype(param.dtype)
    p = param.to(real)
    g = -grad.to(real) if maximize else grad.to(real)
    if weight_decay != 0:
        g = g + weight_decay * p
    total = sum.to(real) + g * g
    sum.copy_(total)
    param.copy_(p - lr / (1 + (step - 1) * lr_decay) * g / (total.sqrt() + eps))


@torch.no_grad()
def lamb_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Step number `step` (1 for the first) of :class:`dlfast.optim.LAMB`."""
    real = _compute_dtype(param.dtype)
    p = param.to(real)
    g = -grad.to(real) if maximize else grad.to(real)
    m = beta1 * exp_avg.to(real) + (1 - beta1) * g
    v = beta2 * exp_avg_sq.to(real) + (1 - beta2) * g * g
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
    direction = m / (1 - beta1**step) / denominator + weight_decay * p
    norms = [t.to(torch.float64).square().sum().sqrt() for t in (p, direction)]
    trust = (norms[0] / norms[1]).item() if norms[0] > 0 and norms[1] > 0 else 1.0
    param.copy_(p - lr * trust * direction)
