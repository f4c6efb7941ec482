"""The functional operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from dlfast import fake, flops, reference
from dlfast._native import native, runs_on
from dlfast.modes import is_transformed

Size2 = int | Sequence[int]

if native.module is not None:
    fake.register()
    flops.register()


def same_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], list[int] | None]:
    """The symmetric part of padding="same", and what `F.pad` must add first where a side needs one more.

    PyTorch puts the odd element at the end (bottom, right).
    """
    total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    low = (total[0] // 2, total[1] // 2)
    extra = [total[0] - 2 * low[0], total[1] - 2 * low[1]]
    return low, [0, extra[1], 0, extra[0]] if any(extra) else None


def pair(name: str, value: Size2) -> tuple[int, int]:
    """`value` as (height, width); an int counts for both."""
    if isinstance(value, int):
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
    """Convolution, then ReLU, then pooling, as one operator.

    What it computes is ``pool(activation(conv2d(input, weight, bias)))``. For max pooling, backward keeps
    beside `input` and `weight` only one byte per pooled element (which position of the window won), not the
    output of the convolution or of the ReLU: ReLU and max commute, so the maximum can be taken first. For
    average pooling after ReLU it keeps one bit per element of the convolution output; without pooling the
    output itself.

    In an exact tie the first position of the window, row by row, takes the gradient, and ReLU's gradient at 0
    is 0, as in PyTorch. Where two values of a window differ by less than rounding, either may win; in 16-bit
    dtypes they may be compared before they are rounded. NaN and infinities propagate as in PyTorch. Results
    are the same from run to run for a given number of threads.

    Args:
        input: :math:`(N, C, H, W)` or :math:`(C, H, W)`; float32, float64, bfloat16 or float16, any strides.
        weight: :math:`(K, C / groups, kh, kw)`, of the dtype and device of `input`.
        bias: :math:`(K)`, or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, ``padding`` in pixels, as
            a pair, or "same" or "valid".
        activation: "relu" or None.
        pool: "max", "avg" or None.
        pool_size, pool_stride, pool_padding, ceil_mode: as ``kernel_size``, ``stride``, ``padding`` and
            ``ceil_mode`` of :func:`torch.nn.functional.max_pool2d` and ``avg_pool2d``; ``pool_stride=None``
            means ``pool_size``. Padding counts in an average (``count_include_pad=True``).

    Returns:
        :math:`(N, K, PH, PW)`, or :math:`(K, PH, PW)` for unbatched input, in the memory format that PyTorch
        would give.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
        ValueError: ``activation``, ``pool`` or ``padding`` is none of the accepted names.
        NotImplementedError: a dtype that is not accepted (integers, complex).

    Below autocast it runs in the autocast dtype, as ``conv2d`` does.

    >>> import torch, dlfast
    >>> x, weight = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 5, 5)
    >>> y = dlfast.conv_relu_pool2d(x, weight, padding=2)
    >>> y.shape
    torch.Size([8, 16, 16, 16])
    >>> plain = torch.nn.functional.conv2d(x, weight, padding=2)
    >>> torch.allclose(y, torch.nn.functional.max_pool2d(plain.relu(), 2), atol=1e-4)
    True
    """
    if has_torch_function_variadic(input, weight, bias):  # torch.fx, tensors of a class of their own
        return handle_torch_function(
            conv_relu_pool2d, (input, weight, bias), input, weight, bias, stride=stride, padding=padding,
            dilation=dilation, groups=groups, activation=activation, pool=pool, pool_size=pool_size,
            pool_stride=pool_stride, pool_padding=pool_padding, ceil_mode=ceil_mode,
        )  # fmt: skip
    if not runs_on(input.device) or is_transformed():
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
