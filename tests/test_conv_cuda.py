"""Convolution blocks as one CUDA kernel: forward and the gradient of the input, against plain PyTorch on the CPU.

Ordinary CUDA tests: they run on a GPU, and under the emulator, which is why the shapes are small.
"""

from __future__ import annotations

from dataclasses import replace

import cases
import pytest
import torch
from cases import Case
from torch import Tensor

import dlfast
from dlfast import reference
from dlfast._native import native

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not native.build.get("cuda"), reason="built without CUDA"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WINDOWS = [{}, {"activation": None}, {"pool_size": 3}, {"pool": None}, {"pool": None, "activation": None}]


def on_cuda(tensor: Tensor, offset: int = 0) -> Tensor:
    """channels_last, also where its strides alone would not tell; `offset` elements into its storage."""
    n, c, h, w = tensor.shape
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
    return storage.as_strided((n, c, h, w), (c * h * w, 1, c * w, c), offset).copy_(tensor)


def ways(tensors: list[Tensor], case: Case) -> dict[str, str]:
    """The chosen way of each part of a block."""
    assert native.module is not None
    pool = case.pool.get("pool", "max")
    size = cases_pair(case.pool.get("pool_size", 2))
    rows = native.module.plan_block(
        tensors[0], tensors[1], cases_pair(case.conv.get("stride", 1)), cases_pair(case.conv.get("padding", 0)),
        cases_pair(case.conv.get("dilation", 1)), case.conv.get("groups", 1), case.pool.get("activation", "relu"),
        pool, size, cases_pair(case.pool.get("pool_stride", size)), cases_pair(case.pool.get("pool_padding", 0)),
        case.pool.get("ceil_mode", False), True,
    )  # fmt: skip
    return {part: path for part, path, _, _, chosen in rows if chosen}


def cases_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def check(case: Case, dtype: torch.dtype, offset: int = 0, bias: bool = True) -> None:
    """Whole numbers: equal to the last bit, gradients too. The case runs the single-kernel way."""
    tensors = cases.integers(case, dtype, bias=bias)
    wide = [t.double() for t in tensors]
    expected, expected_grads = cases.run(reference.conv_relu_pool2d, wide, case.options)
    assert expected.ne(0).any()
    ours = [on_cuda(t, offset) if t.dim() == 4 else t.cuda() for t in tensors]
    chosen = ways(ours, case)
    assert chosen["forward"] == "single"
    if cases_pair(case.conv.get("stride", 1)) == (1, 1):
        assert chosen["grad_input"] == "single"
    output, grads = cases.run(dlfast.conv_relu_pool2d, ours, case.options)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output.cpu().double(), expected.to(dtype).double())
    for name, grad, wanted in zip(["input", "weight", "bias"], grads, expected_grads, strict=False):
        torch.testing.assert_close(
            grad.cpu().double(), wanted.to(dtype).double(), rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(autouse=True)
def single(monkeypatch):
    monkeypatch.setenv("DLFAST_PLAN", "single")


GRID = [
    replace(case, pool=pool)
    for case in cases.CONVS
    for pool in WINDOWS
    if case.n > 0 and case.conv.get("groups", 1) == 1
]


@pytest.mark.parametrize("case", [case for case in GRID if case.pool in WINDOWS], ids=str)
def test_grid_float16(case):
    check(case, torch.float16)


SAMPLE = [
    *(Case(c=c, k=k, h=12, w=18, conv={"padding": 1}, pool=pool) for c, k, pool in [
        (1, 32, {}), (3, 40, {}), (4, 8, {"pool": None}), (8, 33, {}), (24, 64, {"pool_size": 3}), (40, 24, {}),
        (70, 72, {"pool": None}),
    ]),
    Case(c=16, k=16, h=13, w=11, conv={"padding": 1}, pool={"ceil_mode": True}),
    Case(c=16, k=16, h=13, w=11, conv={"padding": 1}, pool={"pool_size": 3, "ceil_mode": True}),
    Case(c=32, k=32, h=5, w=70, kernel=(1, 1)),
    Case(c=64, k=16, h=40, w=4, kernel=(5, 3), conv={"padding": (2, 1)}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_dtypes(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SAMPLE[1], SAMPLE[3], SAMPLE[6]], ids=str)
def test_storage_offsets_and_no_bias(case, dtype):
    check(case, dtype, offset=1, bias=False)
    check(case, dtype, offset=4)
