"""Batch normalisation, ReLU and pooling as one operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake
from torch.overrides import handle_torch_function, has_torch_function

from dlfast import reference
from dlfast._native import native, runs_on
from dlfast.functional.arguments import Size2, Sizes
from dlfast.functional.modes import is_exporting, is_transformed
from dlfast.functional.prepared import norm_block
from dlfast.functional.relu_pool import fake_relu_pool2d
from dlfast.functional.window import Window

STATISTICS = 5  # of a channel: mean, variance, 1 / deviation, scale and shift; see csrc/norm/op.h
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    pool_size: Size2 = 2,
    pool_stride: Size2 | None = None,
    pool_padding: Size2 = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """Batch normalisation, then ReLU, then pooling, as one operator.

    What it computes is ``pool(activation(torch.nn.functional.batch_norm(input, ...)))``. For backward it
    keeps `input` and, for max pooling, one byte per pooled element; the normalised values, the ReLU's output
    and the 8-byte indices are never stored: where gradient passes is found again from `input`. Compiled for
    the CPU and, in a build with CUDA, for GPUs; elsewhere it is the composition of PyTorch's operators.

    Args:
        input: :math:`(N, C, H, W)`; float32, float64, bfloat16 or float16, any strides.
        running_mean, running_var, weight, bias, training, momentum, eps: as in
            :func:`torch.nn.functional.batch_norm`; in training the running statistics are updated.
        activation, pool, pool_size, pool_stride, pool_padding, ceil_mode: as in
            :func:`dlfast.conv_relu_pool2d`.

    Raises:
        RuntimeError: shapes or devices do not fit.
        ValueError: ``activation`` or ``pool`` is none of the accepted names; one value per channel in training.

    >>> import torch, dlfast
    >>> x, mean, var = torch.randn(8, 3, 10, 10), torch.zeros(3), torch.ones(3)
    >>> dlfast.nn.batch_norm_relu_pool2d(x, mean, var, training=True).shape
    torch.Size([8, 3, 5, 5])
    """
    window = Window.checked(pool, pool_size, pool_stride, pool_padding, ceil_mode, activation)
    return normalised(input, running_mean, running_var, weight, bias, training, momentum, eps, window)


def normalised(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, training: bool, momentum: float, eps: float, window: Window,
) -> Tensor:  # fmt: skip
    """:func:`batch_norm_relu_pool2d` with a window that has been checked."""
    given = (input, running_mean, running_var, weight, bias)
    if has_torch_function(given):  # torch.fx, tensors of a class of their own
        return handle_torch_function(
            batch_norm_relu_pool2d, given, *given, training=training, momentum=momentum, eps=eps, **window.options()
        )
    if runs_on(input.device) and not torch.compiler.is_compiling():
        block = norm_block(
            window.activation, window.pool, window.pool_size, window.pool_stride, window.pool_padding, window.ceil_mode
        )
        prepared: Tensor | None = block(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if prepared is not None:
            return prepared
    tensors = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if not _is_native(input, tensors) or any(t is not None and t.requires_grad for t in (running_mean, running_var)):
        return reference.batch_norm_relu_pool2d(
            input, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=eps,
            **window.options(),
        )  # fmt: skip
    count = input.shape[0] * input.shape[2] * input.shape[3]
    if training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError("Expected running_mean and running_var to be defined when training=False")
    save_winner_mask = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *tensors))
    output, _, statistics = torch.ops.dlfast._batch_norm_relu_pool2d.default(
        input, weight, bias, None if training else running_mean, None if training else running_var, eps,
        window.activation, window.pool, window.pool_size, window.pool_stride, window.pool_padding,
        window.ceil_mode, save_winner_mask,
    )  # fmt: skip
    if training:
        with torch.no_grad():
            _move(running_mean, statistics[0], momentum)
            _move(running_var, statistics[1], momentum, count / (count - 1))
    return output  # type: ignore[no-any-return]


def _is_native(input: Tensor, others: list[Tensor]) -> bool:
    """Whether the compiled operator takes it; what it does not take PyTorch computes, or refuses."""
    if not runs_on(input.device) or input.dim() != 4 or input.numel() == 0:
        return False
    if input.dtype not in DTYPES or is_transformed() or is_exporting():
        return False
    channels = input.shape[1:2]
    wide = torch.promote_types(input.dtype, torch.float32)
    return all(t.dtype in (input.dtype, wide) and t.shape == channels and t.device == input.device for t in others)


def _move(running: Tensor | None, batch: Tensor, momentum: float, factor: float = 1.0) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum * factor)


def _fake_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    eps: float, activation: str | None, pool: str | None, pool_size: Sizes, pool_stride: Sizes,
    pool_padding: Sizes, ceil_mode: bool, save_winner_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    output, winner_mask = fake_relu_pool2d(
        input,
        None,
        activation,
        pool,
        pool_size,
        pool_stride,
        pool_padding,
        ceil_mode,
        save_winner_mask and pool == "max",
    )
    wide = torch.promote_types(input.dtype, torch.float32)
    return output, winner_mask, input.new_empty([STATISTICS, input.shape[1]], dtype=wide)


def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, statistics: Tensor, winner_mask: Tensor,
    batch_statistics: bool, eps: float, activation: str | None, pool: str | None, pool_size: Sizes,
    pool_stride: Sizes, pool_padding: Sizes, ceil_mode: bool, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_input = torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))
    vector = statistics.new_empty([input.shape[1]], dtype=None if weight is None else weight.dtype)
    nothing = input.new_empty([0])
    grads = [
        grad.clone() if wanted else nothing.clone()
        for grad, wanted in zip((grad_input, vector, vector), output_mask, strict=True)
    ]
    return grads[0], grads[1], grads[2]


if native.module is not None:
    register_fake("dlfast::_batch_norm_relu_pool2d")(_fake_forward)
    register_fake("dlfast::_batch_norm_relu_pool2d_backward")(_fake_backward)
