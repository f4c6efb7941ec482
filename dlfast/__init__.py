"""Faster training of convolutional networks in PyTorch, with the same meaning."""

from dlfast import models, nn, optim, reference
from dlfast.explain import explain
from dlfast.ops import conv_relu_pool2d

__version__ = "0.1.0"
__all__ = ["__version__", "conv_relu_pool2d", "explain", "models", "nn", "optim", "reference"]
