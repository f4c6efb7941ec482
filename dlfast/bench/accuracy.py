"""``dlfast bench accuracy``: how far each way of computing a convolution is from float64."""

from __future__ import annotations

import functools
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
# What each part of a block is computed by, under the plan of its name.
WAYS = {
    "forward": ("direct", "winograd2", "winograd4"),
    "grad_input": ("direct", "winograd4"),
    "grad_weight": ("direct", "winograd4"),
}


@dataclass(frozen=True)
class Error:
    """The largest difference from float64 over the largest value, and how often PyTorch's own that is."""

    channels: int
    dtype: str
    part: str
    way: str
    relative: float
    of_pytorch: float


def measure(seed: int = 0) -> Iterator[Error]:
    """Convolutions 3x3 of normal inputs after ReLU, weights as `nn.Conv2d` initialises them, normal gradients."""
    generator = torch.Generator().manual_seed(seed)
    for channels in CHANNELS:
        x = torch.randn(2, channels, 32, 32, generator=generator).relu()
        weight = (torch.rand(64, channels, 3, 3, generator=generator) * 2 - 1) * (9 * channels) ** -0.5
        grad = torch.randn(2, 64, 32, 32, generator=generator)
        for dtype in DTYPES:
            low = x.to(dtype), weight.to(dtype), grad.to(dtype)
            exact = _parts(F.conv2d, *(t.double() for t in low))
            pytorch = {part: _relative(value, exact[part]) for part, value in _parts(F.conv2d, *low).items()}
            ours = {way: _run(way, *low) for way in WAYS["forward"]}
            for part, ways in WAYS.items():
                yield Error(channels, str(dtype), part, "PyTorch", pytorch[part], 1.0)
                for way in ways:
                    error = _relative(ours[way][part], exact[part])
                    yield Error(channels, str(dtype), part, way, error, error / pytorch[part])


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
    before = os.environ.get("DLFAST_PLAN")
    os.environ["DLFAST_PLAN"] = way
    try:
        yield
    finally:
        if before is None:
            del os.environ["DLFAST_PLAN"]
        else:
            os.environ["DLFAST_PLAN"] = before
