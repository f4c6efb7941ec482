"""Shapes, strides and dtypes of the compiled operators' results, for torch.compile and torch.export.

The output is whatever the reference gives on tensors without data: one more reason for it to be the law.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from dlfast import reference

Sizes = list[int]


def _empty_code(output: Tensor, z: Tensor, activation: str | None, pool: str | None, pool_size: Sizes,
                save_code: bool) -> Tensor:  # fmt: skip
    """The code that `csrc/conv_relu_pool/params.h` describes, for pooled `output` of convolution output `z`."""
    if save_code and pool == "max":
        wide = pool_size[0] * pool_size[1] > 255
        return torch.empty_like(output, dtype=torch.int32 if wide else torch.uint8)
    if save_code and pool == "avg" and activation == "relu":
        return output.new_empty([(z.numel() + 7) // 8], dtype=torch.uint8)
    return output.new_empty([0], dtype=torch.uint8)


def _relu_pool2d(
    input: Tensor, bias: Tensor | None, activation: str | None, pool: str | None, pool_size: Sizes,
    pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool, save_code: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # The kernel works in one of two layouts, whatever the strides of the input.
    input = input.contiguous(memory_format=torch._prims_common.suggest_memory_format(input))
    output = reference.relu_pool2d(
        input, activation=activation, pool=pool, pool_size=pool_size, pool_stride=pool_stride,
        pool_padding=pool_padding, ceil_mode=ceil_mode,
    )  # fmt: skip
    if output is input:  # an operator never returns its argument
        output = torch.empty_like(input)
    return output, _empty_code(output, input, activation, pool, pool_size, save_code)


def _convolved(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:  # fmt: skip
    z = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    # The operator answers in channels_last wherever an operand suggests it; not all of PyTorch's convolutions do.
    suggested = [torch._prims_common.suggest_memory_format(t) for t in (input, weight)]
    return z.contiguous(memory_format=max(suggested, key=lambda format: format == torch.channels_last))


def _conv_relu_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes,
    groups: int, activation: str | None, pool: str | None, pool_size: Sizes, pool_stride: Sizes,
    pool_padding: Sizes, ceil_mode: bool, save_code: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z = _convolved(input, weight, bias, stride, padding, dilation, groups)
    return _relu_pool2d(z, None, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, save_code)


def _conv_relu_pool2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, code: Tensor, stride: Sizes, padding: Sizes,
    dilation: Sizes, groups: int, activation: str | None, pool: str | None, pool_size: Sizes,
    pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool, output_mask: list[bool],
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


def _relu_pool2d_backward(
    grad_output: Tensor, code: Tensor, input_size: Sizes, activation: str | None, pool: str | None,
    pool_size: Sizes, pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool,
) -> Tensor:  # fmt: skip
    like = code if code.dim() == 4 else grad_output
    shape = [*grad_output.shape[:2], *input_size]
    return grad_output.new_empty(shape).to(memory_format=torch._prims_common.suggest_memory_format(like))


def _relu_pool2d_transpose(
    grad_input: Tensor, code: Tensor, activation: str | None, pool: str | None, pool_size: Sizes,
    pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool,
) -> Tensor:  # fmt: skip
    like = code if code.dim() == 4 else grad_input
    output = reference.relu_pool2d(
        grad_input, pool=pool, pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding,
        ceil_mode=ceil_mode,
    )  # fmt: skip
    return torch.empty_like(output).to(memory_format=torch._prims_common.suggest_memory_format(like))


def _batch_norm_relu_pool2d(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    eps: float, activation: str | None, pool: str | None, pool_size: Sizes, pool_stride: Sizes,
    pool_padding: Sizes, ceil_mode: bool, save_code: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    output, code = _relu_pool2d(
        input, None, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, save_code and pool == "max"
    )
    wide = torch.promote_types(input.dtype, torch.float32)
    statistics = input.new_empty([0 if mean is not None else input.shape[1]], dtype=wide)
    return output, code, statistics, torch.empty_like(statistics)


def _batch_norm_relu_pool2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    code: Tensor, batch_statistics: bool, eps: float, activation: str | None, pool: str | None,
    pool_size: Sizes, pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_input = torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))
    vectors = [torch.empty_like(mean) if like is None else torch.empty_like(like) for like in (weight, bias)]
    nothing = input.new_empty([0])
    grads = [
        grad if wanted else nothing.clone() for grad, wanted in zip([grad_input, *vectors], output_mask, strict=True)
    ]
    return grads[0], grads[1], grads[2]


def register() -> None:
    """Register every fake kernel; called once, when the compiled operators have been loaded."""
    kernels: dict[str, Any] = {
        "_conv_relu_pool2d": _conv_relu_pool2d,
        "_conv_relu_pool2d_backward": _conv_relu_pool2d_backward,
        "_relu_pool2d": _relu_pool2d,
        "_relu_pool2d_backward": _relu_pool2d_backward,
        "_relu_pool2d_transpose": _relu_pool2d_transpose,
        "_batch_norm_relu_pool2d": _batch_norm_relu_pool2d,
        "_batch_norm_relu_pool2d_backward": _batch_norm_relu_pool2d_backward,
    }
    for name, kernel in kernels.items():
        register_fake(f"dlfast::{name}")(kernel)
