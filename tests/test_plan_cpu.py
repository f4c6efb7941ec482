"""The planner on the CPU: what it chooses, and what it is made to do."""

from __future__ import annotations

import os

import pytest
import torch
from test_block_in_pytorch import needs_native

import dlfast

pytestmark = [
    needs_native,
    pytest.mark.skipif("DLFAST_CPU_CAPABILITY" in os.environ, reason="PyTorch is at a higher SIMD level than dlfast"),
]


@pytest.fixture(autouse=True)
def own_choice(monkeypatch):
    monkeypatch.delenv("DLFAST_PLAN", raising=False)


def plan_of(dtype: torch.dtype = torch.float32, **options) -> dlfast.plan.Plan:
    block = dlfast.nn.ConvReLUPool2d(64, 64, 3, padding=1, dtype=dtype, **options)
    return dlfast.explain(block, torch.zeros(8, 64, 32, 32, dtype=dtype, requires_grad=True))


def test_wide_3x3_blocks_take_winograd():
    plan = plan_of()
    assert plan.forward == "winograd4"
    assert plan.grad_input == plan.grad_weight == "sparse"
    assert plan.predicted_gain > 1.2
    assert plan.floor > 0
    for part in plan.parts:
        assert part.chosen.seconds == min(c.seconds for c in part.candidates)
        assert part.candidates[0].path == "pytorch"


@pytest.mark.parametrize(
    ("forced", "forward"),
    [("direct", "direct"), ("masked", "direct"), ("winograd2", "winograd2"), ("epilogue", "pytorch")],
)
def test_a_forced_plan_is_the_plan(monkeypatch, forced, forward):
    monkeypatch.setenv("DLFAST_PLAN", forced)
    assert plan_of().forward == forward


@pytest.mark.parametrize(
    ("dtype", "instructions"),
    [(torch.bfloat16, ("amx_bf16", "avx512_bf16")), (torch.float16, ("amx_fp16", "avx512_fp16"))],
    ids=str,
)
def test_16_bits_are_left_to_pytorch_where_the_cpu_has_instructions_for_them(dtype, instructions):
    """Ours widens them, which wins only where PyTorch's convolution has nothing better."""
    has = torch.cpu.get_capabilities()
    plan = plan_of(dtype)
    assert (plan.forward == "pytorch") == any(has.get(name, False) for name in instructions)


@pytest.mark.parametrize(("channels", "groups", "size", "way"), [(128, 32, 56, "pytorch"), (64, 2, 56, "winograd4")])
def test_winograd_in_groups_needs_channels_and_tiles(channels, groups, size, way):
    """Convolutions alone, as a normalisation follows them: the groups of ResNeXt are too small for transforms."""
    block = dlfast.nn.ConvReLUPool2d(channels, channels, 3, padding=1, groups=groups, activation=None, pool=None)
    plan = dlfast.explain(block, torch.zeros(4, channels, size, size, requires_grad=True))
    assert (plan.forward, plan.grad_input, plan.grad_weight) == (way,) * 3


@pytest.mark.parametrize(
    ("channels", "kernel", "way"), [(1, 3, "masked"), (3, 7, "rows"), (32, 3, "sparse")], ids=["tiny", "stem", "wide"]
)
def test_grad_weight_goes_by_the_number_of_products(channels, kernel, way):
    block = dlfast.nn.ConvReLUPool2d(channels, 64, kernel, padding=kernel // 2)
    assert dlfast.explain(block, torch.zeros(8, channels, 64, 64)).grad_weight == way
