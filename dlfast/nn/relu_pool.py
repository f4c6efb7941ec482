"""ReLU and pooling as one pass, for what no convolution precedes."""

from __future__ import annotations

from torch import Tensor, nn

from dlfast.functional import relu_pool2d
from dlfast.functional.arguments import Size2
from dlfast.functional.window import Window
from dlfast.nn.leaf import as_leaf


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
