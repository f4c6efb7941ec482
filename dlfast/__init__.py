"""Faster training of convolutional networks in PyTorch, with the same meaning."""

from dlfast import _measurements, models, nn, optim, reference
from dlfast.explain import explain
from dlfast.functional import conv_relu_pool2d
from dlfast.fusion import NotFusedWarning, fuse, unfuse, verify
from dlfast.graphed import NotGraphedWarning, graphed_step

__version__ = "0.1.0"
__all__ = [
    "NotFusedWarning", "NotGraphedWarning", "__version__", "conv_relu_pool2d", "explain", "fuse", "graphed_step",
    "models", "nn", "optim", "reference", "unfuse", "verify",
]  # fmt: skip

_measurements.connect(__version__)
