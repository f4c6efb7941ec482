"""What each operator means, in plain PyTorch.

This is the specification: the fallback where no compiled extension is there, the oracle of the tests and
the baseline of the benchmarks. It is differentiable by PyTorch's own autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
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
