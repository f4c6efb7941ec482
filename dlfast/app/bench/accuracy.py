"""``dlfast bench accuracy``: how far each way of computing a convolution is from float64, and how far it may be."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dlfast

CHANNELS = (16, 64, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What each part of a block is computed by, under the algorithm of its name.
WAYS = {
    "forward": ("direct", "winograd2", "winograd4"),
    "grad_input": ("direct", "winograd4"),
    "grad_weight": ("direct", "winograd4"),
}
# What is promised of each way, in units of eps * sqrt(n) for sums of n products.
FACTORS = {"direct": 0.5, "winograd2": 0.25, "winograd4": 1.0}
OUTPUTS, BATCH, SIZE, TAPS = 64, 2, 32, 9
# The direct forward begins a new sum after so many products (kSumTerms in csrc/conv_relu_pool).
SUM_TERMS = 256


@dataclass(frozen=True)
class Error:
    """The largest difference from float64 over the largest value, how often PyTorch's own that is, and the promise."""

    channels: int
    dtype: str
    part: str
    way: str
    relative: float
    of_pytorch: float
    promised: float | None  # nothing of PyTorch's


def promised(part: str, way: str, channels: int, dtype: torch.dtype) -> float:
    """How large `Error.relative` may be.

    A sum of n products in float32 is rounded n times, each time by a part of what has been summed so far; beside the
    result that grows as eps * sqrt(n). A result of 16 bits is rounded once more. PyTorch's own error is no measure:
    which algorithm it takes depends on the CPU and the number of channels, so that the same sums of ours are 2 or 6
    times as far off as it is.

    >>> promised("forward", "direct", 16, torch.float32) < promised("forward", "winograd4", 16, torch.float32) < 3e-6
    True
    """
    terms = {"forward": TAPS * channels, "grad_input": TAPS * OUTPUTS, "grad_weight": BATCH * SIZE * SIZE}[part]
    if (part, way) == ("forward", "direct"):
        terms = min(terms, SUM_TERMS)
    bound = FACTORS[way] * torch.finfo(torch.float32).eps * math.sqrt(terms)
    return bound if dtype == torch.float32 else bound + torch.finfo(dtype).eps / 2


def measure(seed: int = 0) -> Iterator[Error]:
    """Convolutions 3x3 of normal inputs after ReLU, weights as `nn.Conv2d` initialises them, normal gradients."""
    generator = torch.Generator().manual_seed(seed)
    for channels in CHANNELS:
        x = torch.randn(BATCH, channels, SIZE, SIZE, generator=generator).relu()
        weight = (torch.rand(OUTPUTS, channels, 3, 3, generator=generator) * 2 - 1) * (TAPS * channels) ** -0.5
        grad = torch.randn(BATCH, OUTPUTS, SIZE, SIZE, generator=generator)
        for dtype in DTYPES:
            low = x.to(dtype), weight.to(dtype), grad.to(dtype)
            exact = _parts(F.conv2d, *(t.double() for t in low))
            pytorch = {part: _relative(value, exact[part]) for part, value in _parts(F.conv2d, *low).items()}
            ours = {way: _run(way, *low) for way in WAYS["forward"]}
            for part, ways in WAYS.items():
                yield Error(channels, str(dtype), part, "PyTorch", pytorch[part], 1.0, None)
                for way in ways:
                    error, bound = _relative(ours[way][part], exact[part]), promised(part, way, channels, dtype)
                    yield Error(channels, str(dtype), part, way, error, error / pytorch[part], bound)


def _run(way: str, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    with _plan(way):
        return _parts(functools.partial(dlfast.conv_relu_pool2d, pool=None, activation=None), x, weight, grad)


def _parts(convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = convolve(x, weight, padding=1)
    grad_input, grad_weight = torch.autograd.grad(output, (x, weight), grad)
    return {"forward": output.detach(), "grad_input": grad_input, "grad_weight": grad_weight}


def _relative(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


@contextmanager
def _plan(way: str) -> Iterator[None]:
    before = os.environ.get("DLFAST_ALGORITHM")
    os.environ["DLFAST_ALGORITHM"] = way
    try:
        yield
    finally:
        if before is None:
            del os.environ["DLFAST_ALGORITHM"]
        else:
            os.environ["DLFAST_ALGORITHM"] = before
