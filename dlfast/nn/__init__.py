"""Layers that run convolution, ReLU and pooling as one operator."""

from dlfast.nn.conv import ConvPool2d, ConvReLU2d, ConvReLUPool2d

__all__ = ["ConvPool2d", "ConvReLU2d", "ConvReLUPool2d"]
