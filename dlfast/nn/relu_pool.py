"""ReLU and pooling as one pass, for what no convolution precedes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from dlfast import reference
from dlfast._native import runs_on
from dlfast.modes import as_leaf, is_exporting, is_transformed
from dlfast.nn.window import Window
from dlfast.ops import Size2, pair


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


class ReLUPool2d(nn.Module):
    """ReLU and 2-d pooling in one layer without parameters; see :func:`dlfast.nn.relu_pool2d`.

    Args:
        pool: "max" or "avg".
        pool_size, pool_stride, pool_padding, ceil_mode: of the pooling, as in
            :class:`dlfast.nn.ConvReLUPool2d`.
        activation: "relu" or None.

    Shape:
        - input: :math:`(N, C, H, W)` or :math:`(C, H, W)`
        - output: as of the pooling

    Raises:
        ValueError: an argument is outside what is accepted.

    >>> import torch, dlfast
    >>> dlfast.nn.ReLUPool2d(pool_size=2)(torch.randn(4, 8, 10, 10)).shape
    torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        *,
        pool: str | None = "max",
        pool_size: Size2 = 2,
        pool_stride: Size2 | None = None,
        pool_padding: Size2 = 0,
        ceil_mode: bool = False,
        activation: str | None = "relu",
    ) -> None:
        super().__init__()
        self.window = Window.checked(pool, pool_size, pool_stride, pool_padding, ceil_mode, activation)

    def forward(self, input: Tensor) -> Tensor:
        node = as_leaf(self, input)
        return relu_pool2d(input, **self.window.options()) if node is None else node

    def extra_repr(self) -> str:
        return str(self.window)
