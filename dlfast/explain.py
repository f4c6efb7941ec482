"""``dlfast.explain``: which kernels run, and why; what fusing a model would do; what ran."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dlfast import ran as counters
from dlfast.choice import BlockChoice, choose
from dlfast.fusion import fuse
from dlfast.fusion.api import is_fused
from dlfast.fusion.table import FusionReport, report
from dlfast.nn import ConvReLUPool2d


def explain(target: nn.Module, *inputs: Any, ran: bool = False) -> BlockChoice | FusionReport:
    """What runs where, and why. ``print`` the result for people.

    Of a convolution block of `dlfast.nn`: the algorithms chosen for an input, with the candidates, their predicted
    times and the reason. Of any other model: the chains that :func:`dlfast.fuse` takes together, how each runs, what
    it saves and is predicted to gain, and what it leaves alone for which reason.

    Args:
        target: a convolution block, or a model, fused or not; it is not changed.
        inputs: what `target` is called with. A block needs its input, of which only shape, strides, dtype,
            device and ``requires_grad`` count. A model is run on its inputs to learn the sizes; without them
            its chains have no choice yet.
        ran: also run a copy of `target`, fused where it is a model that is not yet, on the inputs: forward, and with
            gradients enabled backward from the sum of its outputs. What ran is listed in ``ran`` of the result, by
            counters that the operators themselves advance when they have finished.

    Raises:
        TypeError: `target` is not a module, or a compiled one, or a block does not come with one input; ``ran=True``
            without inputs.
        RuntimeError: the input does not fit the block.
        ValueError: the inputs do not fit the model.

    >>> import torch, dlfast
    >>> block = dlfast.nn.ConvReLUPool2d(1, 32, 3, padding=1)
    >>> print(dlfast.explain(block, torch.empty(64, 1, 28, 28)))  # doctest: +ELLIPSIS
    0.0289 GFLOP, ...
    predicted gain ...
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> print(dlfast.explain(model))  # doctest: +ELLIPSIS
    Sequential: ... chains can be fused, ...
    >>> print(dlfast.explain(block, torch.randn(64, 1, 28, 28), ran=True))  # doctest: +ELLIPSIS
    0.0289 GFLOP, ...
    ran: ...
    """
    if ran and not inputs:
        raise TypeError("explain: ran=True needs the inputs to run on, got none")
    found: BlockChoice | FusionReport
    if not isinstance(target, ConvReLUPool2d):
        found = report(target, *inputs)
    elif len(inputs) != 1:
        raise TypeError(f"a convolution block takes one input, got {len(inputs)}")
    else:
        found = choose(target, inputs[0])
    return replace(found, ran=tuple(_run(target, inputs))) if ran else found


def _run(target: nn.Module, inputs: tuple[Any, ...]) -> list[counters.Ran]:
    """What of our operators runs in a step of a copy of `target`; the random number generators stay as they are."""
    model = copy.deepcopy(target)
    if not isinstance(model, ConvReLUPool2d) and not is_fused(model):
        model = fuse(model, *inputs)
    inputs = pytree.tree_map(
        lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x, inputs
    )
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), counters.watch() as ran:
        outputs = [t for t in pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
        if outputs:
            torch.autograd.backward([t.sum() for t in outputs])
    return ran
