"""``dlfast.explain``: which kernels run, and why."""

from __future__ import annotations

from torch import Tensor, nn

from dlfast.nn import ConvReLUPool2d
from dlfast.plan import Plan, plan_block


def explain(target: nn.Module, *inputs: Tensor) -> Plan:
    """The plan of a block for an input: candidates, predicted times, the choice and its reason.

    Args:
        target: a convolution block of `dlfast.nn`.
        inputs: its input; only shape, strides, dtype, device and ``requires_grad`` count.

    Raises:
        TypeError: `target` is not a block.
        RuntimeError: the input does not fit.

    >>> import torch, dlfast
    >>> plan = dlfast.explain(dlfast.nn.ConvReLUPool2d(1, 32, 3, padding=1), torch.empty(64, 1, 28, 28))
    >>> print(plan)  # doctest: +ELLIPSIS
    0.0289 GFLOP, ...
    forward: ...
    """
    if not isinstance(target, ConvReLUPool2d):
        raise TypeError(f"target must be a convolution block of dlfast.nn, got {type(target).__name__}")
    if len(inputs) != 1:
        raise TypeError(f"a convolution block takes one input, got {len(inputs)}")
    return plan_block(target, inputs[0])
