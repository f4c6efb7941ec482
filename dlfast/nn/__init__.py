"""Layers that run convolution, normalisation, ReLU and pooling as one operator."""

from dlfast.functional import batch_norm_relu_pool2d, relu_pool2d
from dlfast.nn.batch_norm import BNReLUPool2d, ConvBNReLUPool2d
from dlfast.nn.conv import ConvPool2d, ConvReLU2d, ConvReLUPool2d
from dlfast.nn.relu_pool import ReLUPool2d

__all__ = [
    "BNReLUPool2d",
    "ConvBNReLUPool2d",
    "ConvPool2d",
    "ConvReLU2d",
    "ConvReLUPool2d",
    "ReLUPool2d",
    "batch_norm_relu_pool2d",
    "relu_pool2d",
]
