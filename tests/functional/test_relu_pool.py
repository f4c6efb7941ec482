"""ReLU and pooling as one operator on the CPU: every layout of the input with every layout of the gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import dlfast
from dlfast import reference
from tests.support.native import needs_native

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(2, 3, 12, 13), (2, 8, 6, 6), (3, 1, 8, 8), (2, 5, 2, 2), (1, 4, 7, 9), (0, 3, 6, 6)]
POOLS = ["max", "avg", None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("layout", "grad_layout"), [*itertools.product(LAYOUTS, LAYOUTS)], ids=str)
def test_the_gradient_may_come_in_any_layout(shape, pool, activation, layout, grad_layout):
    """Not in that of the output alone: after a Flatten, say, it is contiguous."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    outputs, grads = [], []
    for function in (dlfast.nn.relu_pool2d, reference.relu_pool2d):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = function(leaf, activation=activation, pool=pool)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        output.backward(grad.contiguous(memory_format=grad_layout))
        outputs.append(output.detach())
        grads.append(leaf.grad)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("layout", "grad_layout"), [*itertools.product(LAYOUTS, LAYOUTS)], ids=str)
def test_second_derivatives_of_a_block_in_any_layout(channels, pool, layout, grad_layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(channels, 3, 3, 3, generator=generator, dtype=torch.float64)
    found = []
    for function in (dlfast.conv_relu_pool2d, reference.conv_relu_pool2d):
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
        output = function(*leaves, pool=pool)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        first = torch.autograd.grad(output, leaves, grad.contiguous(memory_format=grad_layout), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([*first, *second])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours.detach(), plain.detach())


@needs_native
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_compiled_average_has_the_mask_that_the_operator_gives(channels, layout):
    """A fake mask of another shape would end in an error, or in a gradient of another layout."""
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)
    weight = torch.randn(channels, 3, 3, 3)
    torch.library.opcheck(
        torch.ops.dlfast._conv_relu_pool2d.default,
        (
            x,
            weight.requires_grad_(),
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            1,
            "relu",
            "avg",
            [2, 2],
            [2, 2],
            [0, 0],
            False,
            True,
        ),
    )
    z = F.conv2d(x, weight.detach()).contiguous(memory_format=layout)
    torch.library.opcheck(
        torch.ops.dlfast._relu_pool2d.default,
        (z.requires_grad_(), None, "relu", "avg", [2, 2], [2, 2], [0, 0], False, True),
    )
