"""``dlfast bench accuracy``: how far each way of computing a convolution is from float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dlfast

CHANNELS = (16, 64, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = ("direct", "winograd2", "winograd4")


@dataclass(frozen=True)
class Error:
    """The largest difference from float64 over the largest value, and how often PyTorch's own that is."""

    channels: int
    dtype: str
    way: str
    relative: float
    of_pytorch: float


def measure(seed: int = 0) -> Iterator[Error]:
    """Convolutions 3x3 of normal inputs after ReLU, weights as `nn.Conv2d` initialises them, per dtype."""
    generator = torch.Generator().manual_seed(seed)
    for channels in CHANNELS:
        x = torch.randn(2, channels, 32, 32, generator=generator).relu()
        weight = (torch.rand(64, channels, 3, 3, generator=generator) * 2 - 1) * (9 * channels) ** -0.5
        for dtype in DTYPES:
            low, low_weight = x.to(dtype), weight.to(dtype)
            exact = F.conv2d(low.double(), low_weight.double(), padding=1)
            pytorch = _relative(F.conv2d(low, low_weight, padding=1), exact)
            yield Error(channels, str(dtype), "PyTorch", pytorch, 1.0)
            for way in WAYS:
                with _plan(way), torch.no_grad():
                    ours = dlfast.conv_relu_pool2d(low, low_weight, padding=1, pool=None, activation=None)
                error = _relative(ours, exact)
                yield Error(channels, str(dtype), way, error, error / pytorch)


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
