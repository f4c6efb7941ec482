"""The CUDA kernels of grad_weight and grad_bias that expand the pooled gradient themselves.

Ordinary CUDA tests: they run on a GPU, and under the emulator, which is why the shapes are small. What PyTorch
would have for winners, and the dense gradient, come from plain PyTorch in float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlfast.ran import watch
from tests.functional import cases
from tests.functional.cases import Case
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "single")


# How products are computed: the dtype, and whether float32 may be rounded to TF32.
KINDS = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    dtype, tf32 = KINDS[request.param]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    return dtype, tf32


POOLS: list[dict[str, Any]] = [
    {},
    {"activation": None, "ceil_mode": True},
    {"pool_size": 3},
    {"pool_size": 3, "ceil_mode": True},
    {"pool_size": (2, 1), "pool_stride": (3, 2)},
    {"pool": None},
    {"pool": None, "activation": None},
]


def pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def in_channels_last(tensor: Tensor) -> Tensor:
    """On the device. With strides that say so for one channel too, where contiguous() leaves them alone."""
    options = {"dtype": tensor.dtype, "memory_format": torch.channels_last, "device": "cuda"}
    return torch.empty(tensor.shape, **options).copy_(tensor)


@dataclass
class Problem:
    """Arguments of the operator for a case, and the gradient of the convolution output that they stand for."""

    case: Case
    input: Tensor
    weight: Tensor
    grad_y: Tensor  # (N, K, PH, PW)
    winner_mask: Tensor  # as grad_y
    dense: Tensor  # (N, K, OH, OW), float64

    @property
    def conv(self) -> list[Any]:
        options = {"stride": 1, "padding": 0, "dilation": 1, **self.case.conv}
        return [*(list(pair(options[name])) for name in ("stride", "padding", "dilation")), 1]

    @property
    def pooling(self) -> list[Any]:
        options = {"activation": "relu", "pool": "max", "pool_size": 2, "ceil_mode": False, **self.case.pool}
        size = pair(options["pool_size"])
        stride = pair(options.get("pool_stride", size))
        return [options["activation"], options["pool"], list(size), list(stride), [0, 0], options["ceil_mode"]]

    def on_device(self) -> list[Tensor]:
        tensors = [self.grad_y, self.input, self.weight, self.winner_mask]
        return [in_channels_last(t) if t.dim() == 4 else t.cuda() for t in tensors]

    def algorithm(self) -> str:
        _, input, weight, _ = self.on_device()
        return cases.chosen(input, weight, self.conv, self.pooling)["grad_weight"]

    def backward(self, tensors: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        tensors = tensors or self.on_device()
        op = torch.ops.dlfast._conv_relu_pool2d_backward
        with watch() as ran:
            _, grad_weight, grad_bias = op(*tensors, *self.conv, *self.pooling, [False, True, True])
        assert cases.algorithms_of(ran) == {"grad_weight": self.algorithm()}
        assert grad_weight.dtype == grad_bias.dtype == self.input.dtype
        return grad_weight, grad_bias

    def expected(self, input: Tensor | None = None, dense: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """grad_weight and grad_bias in float64."""
        input = self.input.double() if input is None else input
        dense = self.dense if dense is None else dense
        weight = torch.zeros(self.weight.shape, dtype=torch.float64, requires_grad=True)
        stride, padding, dilation, _ = self.conv
        F.conv2d(input, weight, None, stride, padding, dilation).backward(dense)
        assert weight.grad is not None
        return weight.grad, dense.sum((0, 2, 3))


def make(case: Case, dtype: torch.dtype, numbers: str = "integers", seed: int = 0) -> Problem | None:
    """A problem with the winners of a made-up convolution output; None where the window is larger than that."""
    generator = torch.Generator().manual_seed(seed)
    input, weight = (cases.integers if numbers == "integers" else cases.normals)(case, dtype, seed)[:2]
    problem = Problem(case, input, weight, input, input, input)
    stride, padding, dilation, _ = problem.conv
    activation, pool, size, pool_stride, _, ceil_mode = problem.pooling
    shape = F.conv2d(input.float(), weight.float(), None, stride, padding, dilation).shape
    if pool and any(n < k for n, k in zip(shape[2:], size, strict=True)):
        return None
    z = torch.randint(-4, 5, shape, generator=generator).double()

    def gradient(like: Tensor) -> Tensor:
        if numbers == "integers":
            return torch.randint(-2, 3, like.shape, generator=generator).to(dtype)
        return torch.randn(like.shape, generator=generator).to(dtype)

    if pool is None:
        problem.winner_mask = z.to(dtype).relu() if activation else torch.empty(0, dtype=torch.uint8)
        problem.grad_y = gradient(z)
        problem.dense = problem.grad_y.double() * (~(z <= 0) if activation else 1)
        return problem
    pooled, winner = F.max_pool2d(z, size, pool_stride, 0, 1, ceil_mode, return_indices=True)
    row = winner // z.size(3) - torch.arange(pooled.size(2)).view(-1, 1) * pool_stride[0]
    column = winner % z.size(3) - torch.arange(pooled.size(3)) * pool_stride[1]
    none = (pooled <= 0) if activation else torch.zeros_like(pooled, dtype=torch.bool)
    problem.winner_mask = (row * size[1] + column).masked_fill(none, 255).to(torch.uint8)
    problem.grad_y = gradient(pooled)
    sent = problem.grad_y.double().masked_fill(none, 0)
    problem.dense = torch.zeros_like(z).flatten(2).scatter(2, winner.flatten(2), sent.flatten(2)).view(z.shape)
    return problem


def assert_within_bound(problem: Problem, dtype: torch.dtype, tf32: bool) -> None:
    """As cases.forward_bound; operands rounded to TF32 are off by up to 2**-11 each."""
    magnitudes = problem.expected(problem.input.double().abs(), problem.dense.abs())
    terms = problem.dense[:, 0].numel()
    bound = 4 * (terms**0.5 + 1) * torch.finfo(torch.float32).eps
    if dtype != torch.float32:
        bound += torch.finfo(dtype).eps
    products = bound + (2 * 2.0**-11 if tf32 else 0.0)
    actual = problem.backward()
    for name, a, e, m, b in zip(
        ("weight", "bias"), actual, problem.expected(), magnitudes, (products, bound), strict=True
    ):
        assert e.ne(0).any()
        error = (a.cpu().double() - e).abs() - (m * b + torch.finfo(dtype).tiny)
        assert not error.isnan().any()
        assert error.max() <= 0, f"grad_{name} of {problem.case}: {error.max()} above the bound"


PLAIN = [case for case in cases.CONVS if case.conv.get("groups", 1) == 1 and case.n > 0]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_integers_are_exact(case, kind):
    dtype, _ = kind
    tested = 0
    for seed, pool in enumerate(POOLS):
        problem = make(replace(case, pool=pool), dtype, seed=seed)
        if problem is None:
            continue
        assert problem.algorithm() == "single", problem.case
        for name, actual, expected in zip(("weight", "bias"), problem.backward(), problem.expected(), strict=True):
            message = f"grad_{name} of {problem.case}"
            assert torch.equal(actual.cpu(), expected.to(dtype)), message
        tested += problem.expected()[0].ne(0).any().item()
    assert tested >= 2


# Blocks of several kinds: more outputs and channels than one takes, groups of taps, several tiles of a block,
# several images in a tile, tiles and images that end early, channels and outputs that fill no pack.
LARGE = [
    Case(n=3, c=40, h=12, w=20, k=72, conv={"padding": 1}),
    Case(n=2, c=72, h=6, w=7, k=40, kernel=(5, 5), conv={"padding": 2}),
    Case(n=9, c=24, h=4, w=4, k=33, conv={"padding": 1}),
    Case(n=2, c=64, h=18, w=17, k=32, kernel=(1, 1)),
    Case(n=3, c=3, h=40, w=37, k=70, conv={"padding": 1}),
    Case(n=2, c=3, h=33, w=30, k=64, kernel=(7, 7), conv={"padding": 3, "stride": 2}),
    Case(n=2, c=4, h=20, w=26, k=16, kernel=(9, 9), conv={"padding": 4}),
    Case(n=40, c=1, h=6, w=6, k=10, kernel=(5, 5), conv={"padding": 2}),
    Case(n=1, c=17, h=24, w=33, k=6, conv={"padding": 2, "dilation": 2, "stride": (2, 1)}),
]


@pytest.mark.parametrize("pool", [{}, {"pool_size": 3, "ceil_mode": True}, {"pool": None}], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_problems(case, pool, kind):
    dtype, _ = kind
    case = replace(case, pool=pool)
    problem = make(case, dtype)
    assert problem is not None
    assert problem.algorithm() == "single"
    for actual, expected in zip(problem.backward(), problem.expected(), strict=True):
        assert expected.ne(0).any()
        assert torch.equal(actual.cpu(), expected.to(dtype))


@pytest.mark.parametrize("case", [LARGE[2], LARGE[5], LARGE[7]], ids=str)
@pytest.mark.parametrize("pool", [{}, {"pool": None}], ids=str)
def test_normals_are_within_the_bound(case, pool, kind):
    dtype, tf32 = kind
    problem = make(replace(case, pool=pool), dtype, "normals")
    assert problem is not None
    assert problem.algorithm() == "single"
    assert_within_bound(problem, dtype, tf32)
    first, second = problem.backward(), problem.backward()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not the same bits on every run"


@pytest.mark.parametrize("case", [Case(c=3, conv={"padding": 1}), Case(c=8, k=16, conv={"padding": 1})], ids=str)
@pytest.mark.parametrize("pool", [{}, {"pool_size": 3}, {"pool": None}], ids=str)
def test_nan_and_infinity(case, pool, kind):
    """As in PyTorch, zeros of the dense gradient turn an infinite input into NaN, and only at taps that meet it."""
    dtype, _ = kind
    problem = make(replace(case, h=10, w=11, pool=pool), dtype)
    assert problem is not None
    for place, value in {(0, 1, 4, 5): float("inf"), (1, 0, 9, 10): float("nan"), (0, 2, 0, 3): -float("inf")}.items():
        problem.input[place] = value
    actual, _ = problem.backward()
    expected, _ = problem.expected()
    assert 0 < expected.isnan().sum() < expected.numel()
    assert torch.equal(actual.cpu().nan_to_num(99), expected.to(dtype).nan_to_num(99))

    # A gradient that is not finite, away from the padding, which PyTorch's convolutions do not agree about.
    problem = make(replace(case, h=14, w=13, pool=pool), dtype)
    assert problem is not None
    sent = problem.grad_y[:, :, 1:-1, 1:-1]
    sent[0, 3, 0, 1], sent[1, 0, 0, 0] = float("nan"), float("inf")
    winner_mask = problem.winner_mask[:, :, 1:-1, 1:-1]
    winner_mask[0, 3, 0, 1] = winner_mask[1, 0, 0, 0] = 1
    problem.dense = dense_from_code(problem)
    actual_pair, expected_pair = problem.backward(), problem.expected()
    for actual, expected in zip(actual_pair, expected_pair, strict=True):
        assert not expected.isfinite().all()
        assert torch.equal(actual.cpu().nan_to_num(99), expected.to(dtype).nan_to_num(99))


def dense_from_code(problem: Problem) -> Tensor:
    """The dense gradient from what the operator is given alone."""
    _, pool, size, stride, _, _ = problem.pooling
    grad = problem.grad_y.double()
    if pool is None:
        return grad.masked_fill(problem.winner_mask <= 0, 0)
    dense = torch.zeros_like(problem.dense)
    for position in range(size[0] * size[1]):
        sent = grad.masked_fill(problem.winner_mask != position, 0)
        rows, columns = ((n - 1 - at) // s + 1 for n, at, s in
                         zip(dense.shape[2:], divmod(position, size[1]), stride, strict=True))  # fmt: skip
        part = dense[:, :, position // size[1] :: stride[0], position % size[1] :: stride[1]]
        part[:, :, : min(rows, sent.size(2)), : min(columns, sent.size(3))] += sent[:, :, :rows, :columns]
    return dense


@pytest.mark.parametrize("case", [Case(c=16, k=32, h=8, w=8, conv={"padding": 1}),
                                  Case(c=3, k=32, h=8, w=8, conv={"padding": 1})], ids=str)  # fmt: skip
def test_storage_offsets(case, kind):
    """Tensors that begin off a 16-byte boundary, where the aligned case takes wide accesses."""
    dtype, _ = kind
    for pool in ({}, {"pool": None}):
        problem = make(replace(case, pool=pool), dtype)
        assert problem is not None
        moved = []
        for tensor in problem.on_device():
            flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:]
            moved.append(flat.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor))
        assert all(t.data_ptr() % 16 != 0 for t in moved)
        for actual, expected in zip(problem.backward(moved), problem.expected(), strict=True):
            assert torch.equal(actual.cpu(), expected.to(dtype))


def test_what_does_not_fit_is_left_to_pytorch():
    for changes in (
        {"conv": {"groups": 2}, "c": 4, "k": 6},
        {"pool": {"pool_size": 3, "pool_stride": 2}},
        {"pool": {"pool": "avg"}},
    ):
        case = replace(Case(), **changes)
        input, weight = (
            t.cuda().contiguous(memory_format=torch.channels_last) for t in cases.integers(case, torch.half)[:2]
        )
        problem = Problem(case, input, weight, input, input, input)
        conv = [*problem.conv[:3], case.conv.get("groups", 1)]
        names = cases.candidates(input, weight, conv, problem.pooling, "grad_weight")
        assert "pytorch" in names
        assert "single" not in names


@pytest.mark.gpu_only
def test_more_than_2_to_31_elements():
    """An input beyond 32-bit indices; the gradient of its last image alone."""
    input = torch.zeros(45, 64, 900, 900, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
    assert input.numel() > 2**31
    input[-1].normal_()
    weight = torch.zeros(32, 64, 3, 3, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
    grad = torch.randn(45, 32, 450, 450, device="cuda").half().to(memory_format=torch.channels_last)
    winner_mask = torch.randint(0, 4, grad.shape, device="cuda", dtype=torch.uint8).to(
        memory_format=torch.channels_last
    )
    options = ([1, 1], [1, 1], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False, [False, True, False])
    op = torch.ops.dlfast._conv_relu_pool2d_backward
    _, whole, _ = op(grad, input, weight, winner_mask, *options)
    _, last, _ = op(grad[-1:], input[-1:], weight, winner_mask[-1:], *options)
    torch.testing.assert_close(whole, last, rtol=1e-2, atol=1e-2 * last.abs().max().item())
