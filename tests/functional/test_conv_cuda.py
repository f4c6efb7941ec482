"""Convolution blocks as one CUDA kernel: forward and the gradient of the input, against plain PyTorch on the CPU.

Ordinary CUDA tests: they run on a GPU, and under the emulator, which is why the shapes are small.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dlfast
from dlfast import reference
from dlfast._native import native
from dlfast.ran import watch
from tests.functional import cases
from tests.functional.cases import Case
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WINDOWS = [{}, {"activation": None}, {"pool_size": 3}, {"pool": None}, {"pool": None, "activation": None}]


def on_cuda(tensor: Tensor, offset: int = 0) -> Tensor:
    """channels_last, also where its strides alone would not tell; `offset` elements into its storage."""
    n, c, h, w = tensor.shape
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
    return storage.as_strided((n, c, h, w), (c * h * w, 1, c * w, c), offset).copy_(tensor)


def algorithms(tensors: list[Tensor], case: Case) -> dict[str, str]:
    """The chosen algorithm of each part of a block."""
    assert native.module is not None
    pool = case.pool.get("pool", "max")
    size = cases_pair(case.pool.get("pool_size", 2))
    conv = [
        cases_pair(case.conv.get(name, default)) for name, default in [("stride", 1), ("padding", 0), ("dilation", 1)]
    ]
    return cases.chosen(
        tensors[0], tensors[1], [*conv, case.conv.get("groups", 1)],
        (
            case.pool.get("activation", "relu"), pool, size, cases_pair(case.pool.get("pool_stride", size)),
            cases_pair(case.pool.get("pool_padding", 0)), case.pool.get("ceil_mode", False),
        ),
    )  # fmt: skip


def cases_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def check(case: Case, dtype: torch.dtype, offset: int = 0, bias: bool = True) -> None:
    """Whole numbers: equal to the last bit, gradients too. The case runs the single-kernel way."""
    tensors = cases.integers(case, dtype, bias=bias)
    wide = [t.double() for t in tensors]
    expected, expected_grads = cases.run(reference.conv_relu_pool2d, wide, case.options)
    assert expected.ne(0).any()
    ours = [on_cuda(t, offset) if t.dim() == 4 else t.cuda() for t in tensors]
    chosen = algorithms(ours, case)
    assert chosen["forward"] == "single"
    if cases_pair(case.conv.get("stride", 1)) == (1, 1):
        assert chosen["grad_input"] == "single"
    with watch() as ran:
        output, grads = cases.run(dlfast.conv_relu_pool2d, ours, case.options)
    assert cases.algorithms_of(ran) == chosen
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output.cpu().double(), expected.to(dtype).double())
    for name, grad, wanted in zip(["input", "weight", "bias"], grads, expected_grads, strict=False):
        torch.testing.assert_close(
            grad.cpu().double(), wanted.to(dtype).double(), rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(autouse=True)
def single(monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "single")


GRID = [
    replace(case, pool=pool)
    for case in cases.CONVS
    for pool in WINDOWS
    if case.n > 0
    and case.conv.get("groups", 1) == 1
    # 48 strided columns are more than the shared memory of most devices holds.
    and not (case.conv == {"stride": 2} and pool == {"pool_size": 3})
]


@pytest.mark.parametrize("case", GRID, ids=str)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in SAMPLE if case.c <= 24], ids=str)
def test_without_tensor_cores(case, dtype, monkeypatch):
    """Ordinary multiply-adds: float32 where TF32 is not allowed, and what devices before sm_80 run."""
    monkeypatch.setenv("DLFAST_MATH_MODE", "fma")
    check(case, dtype)


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("case", SAMPLE[:4], ids=str)
def test_precision_of_float32_follows_pytorch(case, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    tensors = cases.normals(case, torch.float32)
    input, weight = (on_cuda(t) for t in tensors[:2])
    output = dlfast.conv_relu_pool2d(input, weight, tensors[2].cuda(), **case.options)
    exact = reference.conv_relu_pool2d(*(t.double() for t in tensors), **case.options)
    error = (output.cpu().double() - exact).abs()
    bound = cases.forward_bound(case, tensors, torch.float32)
    # Both factors of a product are rounded to 11 bits.
    magnitude = reference.conv_relu_pool2d(*(t.double().abs() for t in tensors), **case.options)
    assert (error <= bound + 2 * 2.0**-11 * magnitude).all()
    assert (error <= bound).all() != tf32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_accuracy_against_float64(case, dtype):
    tensors = cases.normals(case, dtype)
    input, weight = (on_cuda(t) for t in tensors[:2])
    output = dlfast.conv_relu_pool2d(input, weight, tensors[2].cuda(), **case.options)
    exact = reference.conv_relu_pool2d(*(t.double() for t in tensors), **case.options)
    assert ((output.cpu().double() - exact).abs() <= cases.forward_bound(case, tensors, dtype)).all()


@pytest.mark.parametrize("products", ["", "fma"], ids=["tensor_core", "fma"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["input", "weight", "bias", "grad"])
@pytest.mark.parametrize("channels", [3, 16])
def test_nan_and_infinity(channels, where, value, products, monkeypatch):
    """They meet the same zeros as in PyTorch, and no others: not those that fill up shared memory."""
    monkeypatch.setenv("DLFAST_MATH_MODE", products)
    case = Case(c=channels, k=12, h=11, w=13, kernel=(3, 3))
    tensors = [*cases.integers(case, torch.float16), torch.ones(2, 12, 4, 5, dtype=torch.float16)]
    tensors[["input", "weight", "bias", "grad"].index(where)].view(-1)[5] = value

    def run(function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        output = function(*leaves)
        output.backward(tensors[3])
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    ours = run(dlfast.conv_relu_pool2d, [on_cuda(t) if t.dim() == 4 else t.cuda() for t in tensors])
    # Winners are those of float32 sums, in both.
    expected = run(reference.conv_relu_pool2d, [t.float() for t in tensors])
    if where == "weight":  # at the border of grad_input it meets zeros here, nothing in PyTorch's own kernels
        ours[1], expected[1] = (t[:, :, 2:-2, 2:-2] for t in (ours[1], expected[1]))
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual.cpu().float(), wanted, rtol=0, atol=0, equal_nan=True)


def test_inference_saves_no_code():
    case = Case(c=16, k=16, conv={"padding": 1})
    tensors = cases.integers(case, torch.float16)
    input, weight = (on_cuda(t) for t in tensors[:2])
    options = ([1, 1], [1, 1], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False)
    output, winner_mask = torch.ops.dlfast._conv_relu_pool2d(input, weight, tensors[2].cuda(), *options, False)
    kept, winner_masks = torch.ops.dlfast._conv_relu_pool2d(input, weight, tensors[2].cuda(), *options, True)
    assert winner_mask.numel() == 0
    assert winner_masks.shape == output.shape
    assert torch.equal(output, kept)


@pytest.mark.gpu_only
def test_many_images():
    """More than 2**31 elements of input and output."""
    input = torch.randn(1200, 16, 352, 352, device="cuda", dtype=torch.float16)
    input = input.contiguous(memory_format=torch.channels_last)
    assert input.numel() > 2**31
    weight = torch.randn(16, 16, 3, 3, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    output = dlfast.conv_relu_pool2d(input, weight, padding=1)
    expected = reference.conv_relu_pool2d(input[-2:], weight, padding=1)
    torch.testing.assert_close(output[-2:], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("last", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_strides_are_those_that_compile_expects(last, dtype):
    formats = [torch.channels_last if x else torch.contiguous_format for x in last]
    input = torch.randn(2, 8, 10, 10, device="cuda", dtype=dtype).to(memory_format=formats[0])
    weight = torch.randn(8, 8, 3, 3, device="cuda", dtype=dtype).to(memory_format=formats[1])
    args = (input, weight, None, [1, 1], [0, 0], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False, True)
    forward = torch.ops.dlfast._conv_relu_pool2d.default
    torch.library.opcheck(forward, args, test_utils=("test_schema", "test_faketensor"))


def test_what_outgrows_a_tile_is_left_to_pytorch():
    """Its patch would have 2^32 pixels, which is 0 in 32 bits."""
    case = Case(n=1, c=8, k=8, h=1, w=1, kernel=(3, 3), conv={"padding": 32760, "dilation": 32760},
                pool={"pool": None})  # fmt: skip
    tensors = [on_cuda(t) if t.dim() == 4 else t.cuda() for t in cases.integers(case, torch.float16)]
    assert algorithms(tensors, case)["forward"] == "pytorch"


def test_products_are_named(monkeypatch):
    monkeypatch.setenv("DLFAST_MATH_MODE", "tensor_core")
    input, weight = torch.ones(1, 8, 4, 4, device="cuda"), torch.ones(8, 8, 3, 3, device="cuda")
    with pytest.raises(ValueError, match="DLFAST_MATH_MODE must be fma or unset, got tensor_core"):
        dlfast.conv_relu_pool2d(input, weight)
