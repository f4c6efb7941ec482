"""The functional operator, and what PyTorch needs to know of the compiled ones (fake kernels)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dlfast import reference
from dlfast._native import native

Size2 = int | Sequence[int]


def same_padding(
    kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], list[int] | None]:
    """The symmetric part of padding="same", and what `F.pad` must add first where a side needs one more.

    PyTorch puts the odd element at the end (bottom, right).
    """
    total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    low = (total[0] // 2, total[1] // 2)
    extra = [total[0] - 2 * low[0], total[1] - 2 * low[1]]
    return low, [0, extra[1], 0, extra[0]] if any(extra) else None


def pair(name: str, value: Size2) -> tuple[int, int]:
    """`value` as (height, width); an int counts for both."""
    if isinstance(value, int) or (isinstance(value, torch.SymInt)):
        return (value, value)
    values = tuple(value)
    if len(values) == 1:
        return (values[0], values[0])
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    return (values[0], values[1])


def conv_relu_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    activation: str | None = "relu",
    pool: str | None = "max",
    pool_size: Size2 = 2,
    pool_stride: Size2 | None = None,
    pool_padding: Size2 = 0,
    ceil_mode: bool = False,
) -> Tensor:
    if native.module is None:
        return reference.conv_relu_pool2d(
            input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
            activation=activation, pool=pool, pool_size=pool_size, pool_stride=pool_stride,
            pool_padding=pool_padding, ceil_mode=ceil_mode,
        )  # fmt: skip
    if isinstance(padding, str):
        input, padding = _pad_by_name(input, weight, padding, stride, dilation)
    return torch.ops.dlfast.conv_relu_pool2d.default(  # type: ignore[no-any-return]
        input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
        activation=activation, pool=pool, pool_size=pool_size, pool_stride=pool_stride,
        pool_padding=pool_padding, ceil_mode=ceil_mode,
    )  # fmt: skip


def _pad_by_name(
    input: Tensor, weight: Tensor, padding: str, stride: Size2, dilation: Size2
) -> tuple[Tensor, tuple[int, int]]:
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be an int, a pair of ints, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in pair("stride", stride)):
        raise ValueError(f"padding='same' is not supported for strided convolutions, got stride={stride}")
    if weight.dim() != 4:
        raise RuntimeError(f"weight must have 4 dimensions, got shape {tuple(weight.shape)}")
    low, extra = same_padding(weight.shape[2:], pair("dilation", dilation))
    return (F.pad(input, extra) if extra else input), low
