"""The CUDA kernels of grad_weight and grad_bias that expand the pooled gradient themselves.

Ordinary CUDA tests: they run on a GPU, and under the emulator, which is why the shapes are small. What PyTorch
would have for winners, and the dense gradient, come from plain PyTorch in float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from dlfast._native import native

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not native.build.get("cuda"), reason="built without CUDA"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("DLFAST_PLAN", "single")


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
    code: Tensor  # as grad_y
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
        tensors = [self.grad_y, self.input, self.weight, self.code]
        return [in_channels_last(t) if t.dim() == 4 else t.cuda() for t in tensors]

    def path(self) -> str:
        _, input, weight, _ = self.on_device()
        rows = native.module.plan_block(input, weight, *self.conv, *self.pooling, True)
        return next(name for part, name, *_, chosen in rows if part == "grad_weight" and chosen)

    def backward(self, tensors: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        tensors = tensors or self.on_device()
        op = torch.ops.dlfast._conv_relu_pool2d_backward
        _, grad_weight, grad_bias = op(*tensors, *self.conv, *self.pooling, [False, True, True])
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
        problem.code = z.to(dtype).relu() if activation else torch.empty(0, dtype=torch.uint8)
        problem.grad_y = gradient(z)
        problem.dense = problem.grad_y.double() * (~(z <= 0) if activation else 1)
        return problem
    pooled, winner = F.max_pool2d(z, size, pool_stride, 0, 1, ceil_mode, return_indices=True)
    row = winner // z.size(3) - torch.arange(pooled.size(2)).view(-1, 1) * pool_stride[0]
    column = winner % z.size(3) - torch.arange(pooled.size(3)) * pool_stride[1]
    none = (pooled <= 0) if activation else torch.zeros_like(pooled, dtype=torch.bool)
    problem.code = (row * size[1] + column).masked_fill(none, 255).to(torch.uint8)
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
        assert problem.path() == "single", problem.case
        for name, actual, expected in zip(("weight", "bias"), problem.backward(), problem.expected(), strict=True):
            message = f"grad_{name} of {problem.case}"
            assert torch.equal(actual.cpu(), expected.to(dtype)), message
        tested += problem.expected()[0].ne(0).any().item()
    assert tested >= 2
