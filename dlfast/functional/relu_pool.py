"""ReLU and pooling as one operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake
from torch.overrides import handle_torch_function, has_torch_function_unary

from dlfast import reference
from dlfast._native import native, runs_on
from dlfast.functional.arguments import Size2, Sizes, pair
from dlfast.functional.modes import is_exporting, is_transformed


def relu_pool2d(
    input: Tensor,
    *,
    activation: str | None = "relu",
    pool: str | None = "max",
    pool_size: Size2 = 2,
    pool_stride: Size2 | None = None,
    pool_padding: Size2 = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """ReLU, then pooling, as one operator: what :func:`dlfast.conv_relu_pool2d` does after its convolution.

    Backward keeps one byte per pooled element, neither the ReLU's output nor 8-byte indices.

    Args:
        input: :math:`(N, C, H, W)` or :math:`(C, H, W)`; float32, float64, bfloat16 or float16, any strides.
        activation, pool, pool_size, pool_stride, pool_padding, ceil_mode: as in
            :func:`dlfast.conv_relu_pool2d`.

    Raises:
        RuntimeError: the shape does not fit.
        ValueError: ``activation`` or ``pool`` is none of the accepted names.

    >>> import torch, dlfast
    >>> x = torch.randn(8, 3, 32, 32)
    >>> y = dlfast.nn.relu_pool2d(x, pool_size=3, pool_stride=2)
    >>> torch.equal(y, torch.nn.functional.max_pool2d(x.relu(), 3, 2))
    True
    """
    if has_torch_function_unary(input):  # torch.fx, tensors of a class of their own
        return handle_torch_function(
            relu_pool2d, (input,), input, activation=activation, pool=pool, pool_size=pool_size,
            pool_stride=pool_stride, pool_padding=pool_padding, ceil_mode=ceil_mode,
        )  # fmt: skip
    if is_transformed() or is_exporting() or not runs_on(input.device):
        return reference.relu_pool2d(
            input, activation=activation, pool=pool, pool_size=pool_size, pool_stride=pool_stride,
            pool_padding=pool_padding, ceil_mode=ceil_mode,
        )  # fmt: skip
    size = pair("pool_size", pool_size)
    output: Tensor = torch.ops.dlfast._relu_pool2d.default(
        input.unsqueeze(0) if input.dim() == 3 else input, None, activation, pool, size,
        size if pool_stride is None else pair("pool_stride", pool_stride), pair("pool_padding", pool_padding),
        ceil_mode, torch.is_grad_enabled() and input.requires_grad,
    )[0]  # fmt: skip
    return output.squeeze(0) if input.dim() == 3 else output


def fake_relu_pool2d(
    input: Tensor, bias: Tensor | None, activation: str | None, pool: str | None, pool_size: Sizes,
    pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool, save_winner_mask: bool,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # The kernel works in one of two layouts, whatever the strides of the input.
    memory_format = memory_format or torch._prims_common.suggest_memory_format(input)
    input = input.contiguous(memory_format=memory_format)
    output = reference.relu_pool2d(
        input, activation=activation, pool=pool, pool_size=pool_size, pool_stride=pool_stride,
        pool_padding=pool_padding, ceil_mode=ceil_mode,
    )  # fmt: skip
    if output is input:  # an operator never returns its argument
        output = torch.empty_like(input)
    return output, _empty_winner_mask(output, input, activation, pool, pool_size, save_winner_mask, memory_format)


def _empty_winner_mask(
    output: Tensor, z: Tensor, activation: str | None, pool: str | None, pool_size: Sizes, save_winner_mask: bool,
    memory_format: torch.memory_format,
) -> Tensor:  # fmt: skip
    """The winner mask that `csrc/pool/op.h` describes, for pooled `output` of convolution output `z`."""
    if save_winner_mask and pool == "max":
        wide = pool_size[0] * pool_size[1] > 255
        return torch.empty_like(output, dtype=torch.int32 if wide else torch.uint8)
    if save_winner_mask and pool == "avg" and activation == "relu":
        bytes = (z.numel() + 7) // 8
        return output.new_empty([bytes, 1] if memory_format == torch.channels_last else [bytes], dtype=torch.uint8)
    return output.new_empty([0], dtype=torch.uint8)


def _fake_backward(
    grad_output: Tensor, winner_mask: Tensor, input_size: Sizes, activation: str | None, pool: str | None,
    pool_size: Sizes, pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool,
) -> Tensor:  # fmt: skip
    shape = [*grad_output.shape[:2], *input_size]
    return grad_output.new_empty(shape).to(memory_format=_layout_of(winner_mask, grad_output))


def _layout_of(winner_mask: Tensor, grad: Tensor) -> torch.memory_format:
    """That of what was pooled: its winner mask tells, by its strides or its shape; without one the gradient does."""
    if winner_mask.dim() == 2:
        return torch.channels_last
    if winner_mask.dim() == 1 and winner_mask.numel() > 0:
        return torch.contiguous_format
    return torch._prims_common.suggest_memory_format(winner_mask if winner_mask.dim() == 4 else grad)


def _fake_transpose(
    grad_input: Tensor, winner_mask: Tensor, activation: str | None, pool: str | None, pool_size: Sizes,
    pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool,
) -> Tensor:  # fmt: skip
    output = reference.relu_pool2d(
        grad_input, pool=pool, pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding,
        ceil_mode=ceil_mode,
    )  # fmt: skip
    return torch.empty_like(output).to(memory_format=_layout_of(winner_mask, grad_input))


if native.module is not None:
    register_fake("dlfast::_relu_pool2d")(fake_relu_pool2d)
    register_fake("dlfast::_relu_pool2d_backward")(_fake_backward)
    register_fake("dlfast::_relu_pool2d_transpose")(_fake_transpose)
