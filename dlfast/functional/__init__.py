"""The operators as functions, each in a file of its own.

Beside an operator stands its fake kernel: shapes, strides and dtypes of its results, for torch.compile and export.
What it answers is what the reference gives on tensors without data: one more reason for that to be the law.
"""

from dlfast.functional.batch_norm_relu_pool import batch_norm_relu_pool2d
from dlfast.functional.conv_relu_pool import conv_relu_pool2d
from dlfast.functional.relu_pool import relu_pool2d

__all__ = ["batch_norm_relu_pool2d", "conv_relu_pool2d", "relu_pool2d"]
