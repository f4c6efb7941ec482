"""Convolution, ReLU and pooling as one operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_fake
from torch.overrides import handle_torch_function, has_torch_function_variadic

from dlfast import reference
from dlfast._native import native, runs_on
from dlfast.functional import flops
from dlfast.functional.arguments import Size2, Sizes, pair, same_padding
from dlfast.functional.modes import is_transformed
from dlfast.functional.prepared import conv_block
from dlfast.functional.relu_pool import fake_relu_pool2d


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
    on_device = runs_on(input.device)
    if on_device and type(padding) is not str and not torch.compiler.is_compiling():
        try:
            block = conv_block(
                stride, padding, dilation, groups, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode
            )
        except TypeError:  # of a list, or of what the operator below refuses
            block = None
        if block is not None:
            output: Tensor | None = block(input, weight, bias)
            if output is not None:
                return output
    if not on_device or is_transformed():
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


def _convolved(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:  # fmt: skip
    z = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return z.contiguous(memory_format=_answered_in(input, weight))


def _answered_in(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The operator answers in channels_last wherever an operand suggests it; not all of PyTorch's convolutions do."""
    suggested = [torch._prims_common.suggest_memory_format(t) for t in (input, weight)]
    return max(suggested, key=lambda format: format == torch.channels_last)


def _fake_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes,
    groups: int, activation: str | None, pool: str | None, pool_size: Sizes, pool_stride: Sizes,
    pool_padding: Sizes, ceil_mode: bool, save_winner_mask: bool, algorithms: Sizes | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z = _convolved(input, weight, bias, stride, padding, dilation, groups)
    return fake_relu_pool2d(
        z, None, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, save_winner_mask,
        _answered_in(input, weight),
    )  # fmt: skip


def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, winner_mask: Tensor, stride: Sizes, padding: Sizes,
    dilation: Sizes, groups: int, activation: str | None, pool: str | None, pool_size: Sizes,
    pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool, output_mask: list[bool],
    algorithms: Sizes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    z = _convolved(input, weight, None, stride, padding, dilation, groups)
    grads = torch.ops.aten.convolution_backward(
        torch.empty_like(z), input, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0],
        groups, output_mask,
    )  # fmt: skip
    nothing = input.new_empty([0])
    grad_input, grad_weight, grad_bias = (
        grad if wanted else nothing.clone() for grad, wanted in zip(grads, output_mask, strict=True)
    )
    return grad_input, grad_weight, grad_bias


if native.module is not None:
    register_fake("dlfast::_conv_relu_pool2d")(_fake_forward)
    register_fake("dlfast::_conv_relu_pool2d_backward")(_fake_backward)
    flops.register()
