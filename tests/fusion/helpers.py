"""What ran fused, and inputs for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.utils.prune
from torch import nn

from dlfast.fusion.run import ChainRun

CONV, CONV_BN, BN, RELU = "conv", "conv bn", "bn", "relu"  # chains by their heads


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What chains run fused within, in their order: a model that runs plain gives the same results."""
    ran: list[str] = []
    whole = ChainRun._fused

    def noted(run: ChainRun, input: torch.Tensor) -> torch.Tensor:
        parts = [name for name, link in (("conv", run.conv), ("bn", run.bn)) if link is not None]
        ran.append(" ".join(parts) or "relu")
        return whole(run, input)

    with mock.patch.object(ChainRun, "_fused", noted):
        yield ran


def runs_fused(model: nn.Module, x: torch.Tensor) -> bool:
    with recorded() as ran, torch.no_grad():
        model(x)
    return bool(ran)


def example_of(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(getattr(model, "example", (2, 3, 20, 20)), generator=generator)


def small_images() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
