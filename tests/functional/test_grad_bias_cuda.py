"""grad_bias of the epilogue path on CUDA, summed over the pooled gradient, against the sum over the dense one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dlfast
from tests.functional import cases
from tests.functional.cases import Case
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
POOLS: list[dict[str, Any]] = [
    *cases.POOLS,
    {"pool_size": 17, "pool_stride": 4, "pool_padding": 8},  # codes of 32 bits
]
# Packs of channels and of planes, tails of both, more channels than a block takes, several splits.
SHAPES = [
    Case(n=2, c=2, h=16, w=16, k=16, kernel=(1, 1)),
    Case(n=3, c=1, h=11, w=9, k=7, kernel=(1, 1)),
    Case(n=9, c=1, h=24, w=20, k=3, kernel=(1, 1)),
    Case(n=1, c=1, h=9, w=9, k=530, kernel=(1, 1)),
]


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "pytorch")


def grad_bias(case: Case, tensors: list[Tensor], memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Ours on the device, and the reference's in float64; the bias alone wants its gradient."""
    input, weight, bias = tensors
    on_device = [t.cuda().contiguous(memory_format=memory_format) for t in (input, weight)]
    leaf = bias.cuda().requires_grad_()
    output = dlfast.conv_relu_pool2d(*on_device, leaf, **case.options)
    grad = (
        torch.arange(output.numel())
        .remainder(5)
        .sub(2)
        .add(torch.arange(output.numel()).remainder(3))
        .view(output.shape)
    )
    output.backward(grad.to(output))
    exact = bias.double().requires_grad_()
    expected = dlfast.reference.conv_relu_pool2d(input.double(), weight.double(), exact, **case.options)
    expected.backward(grad.double())
    assert leaf.grad is not None
    assert exact.grad is not None
    return leaf.grad.cpu(), exact.grad


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype, memory_format):
    tested = 0
    for shape in SHAPES:
        for pool in POOLS:
            case = replace(shape, pool=pool)
            actual, expected = grad_bias(case, cases.integers(case, dtype), memory_format)
            if case.options.get("pool") != "avg":
                assert torch.equal(actual, expected.to(dtype)), case
            else:
                # The dense gradient of an average is rounded to dtype before it is summed.
                scale = case.n * case.h * case.w
                torch.testing.assert_close(
                    actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=scale * torch.finfo(dtype).eps
                )
            tested += expected.ne(0).any().item()
    assert tested > len(SHAPES) * len(POOLS) * 3 // 4


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_the_same_bits_on_every_run(memory_format):
    case = Case(n=8, c=3, h=20, w=18, k=24)
    first, expected = grad_bias(case, cases.normals(case, torch.float32), memory_format)
    second, _ = grad_bias(case, cases.normals(case, torch.float32), memory_format)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-3)


def test_nan_passes_and_empty_is_zero():
    case = Case(n=2, c=1, h=8, w=8, k=4, kernel=(1, 1))
    tensors = cases.integers(case, torch.float32)
    tensors[0][0, 0, 2, 2] = float("nan")
    for pool in ({}, {"pool": None}):
        actual, expected = grad_bias(replace(case, pool=pool), tensors, torch.channels_last)
        torch.testing.assert_close(actual.double(), expected, equal_nan=True)
    bias = torch.ones(4, device="cuda", requires_grad=True)
    empty = torch.empty(0, 1, 8, 8, device="cuda")
    dlfast.conv_relu_pool2d(empty, tensors[1].cuda(), bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.eq(0).all()
