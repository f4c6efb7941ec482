"""``dlfast.explain``: which kernels run, and why; what fusing a model would do."""

from __future__ import annotations

from typing import Any

from torch import nn

from dlfast.fusion.table import FusionReport, report
from dlfast.nn import ConvReLUPool2d
from dlfast.plan import Plan, plan_block


def explain(target: nn.Module, *inputs: Any) -> Plan | FusionReport:
    """What runs where, and why. ``print`` the result for people.

    Of a convolution block of `dlfast.nn`: its plan for an input, with the candidates, their predicted times,
    the choice and its reason. Of any other model: the chains that :func:`dlfast.fuse` takes together, how
    each runs, what it saves and is predicted to gain, and what it leaves alone for which reason.

    Args:
        target: a convolution block, or a model, fused or not; it is not changed.
        inputs: what `target` is called with. A block needs its input, of which only shape, strides, dtype,
            device and ``requires_grad`` count. A model is run on its inputs to learn the sizes; without them
            its chains have no plan.

    Raises:
        TypeError: `target` is not a module, or a compiled one, or a block does not come with one input.
        RuntimeError: the input does not fit the block.
        ValueError: the inputs do not fit the model.

    >>> import torch, dlfast
    >>> plan = dlfast.explain(dlfast.nn.ConvReLUPool2d(1, 32, 3, padding=1), torch.empty(64, 1, 28, 28))
    >>> print(plan)  # doctest: +ELLIPSIS
    0.0289 GFLOP, ...
    predicted gain ...
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> print(dlfast.explain(model))  # doctest: +ELLIPSIS
    Sequential: ... chains can be fused, ...
    """
    if not isinstance(target, ConvReLUPool2d):
        return report(target, *inputs)
    if len(inputs) != 1:
        raise TypeError(f"a convolution block takes one input, got {len(inputs)}")
    return plan_block(target, inputs[0])
