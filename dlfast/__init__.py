"""Faster training of convolutional networks in PyTorch, with the same meaning."""

from dlfast import optim, reference
from dlfast._native import native
from dlfast.ops import conv_relu_pool2d

__version__ = "0.1.0"
__all__ = ["__version__", "conv_relu_pool2d", "native", "optim", "reference"]
