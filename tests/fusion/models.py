"""Awkward models for `dlfast.fuse`: those that it must handle, and those that it must leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
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


class Plain(nn.Sequential):
    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 81, 3))


class PoolBeforeReLU(nn.Sequential):
    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True), nn.Flatten())


class ConvThenPool(nn.Sequential):
    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.ReLU())


class Normalised(nn.Sequential):
    fused = frozenset({CONV_BN})

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False, track_running_stats=False), nn.AvgPool2d(2),
        )  # fmt: skip
        nn.init.normal_(self[1].weight)


class Rising(nn.Sequential):
    """The maximum is taken before activations that stay in place."""

    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.3), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 1), nn.ReLU6(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip


class Functional(nn.Module):
    fused = frozenset({CONV})
    example = (2, 3, 40, 40)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.d = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = torch.max_pool2d(self.b(x).relu(), kernel_size=2, stride=2)
        x = F.avg_pool2d(torch.relu(self.c(x)), 2)
        x = F.max_pool2d(self.d(x), 2)
        return x.relu_().flatten(1)


class Branches(nn.Module):
    """An intermediate that is used elsewhere is not swallowed; other chains are."""

    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        y = F.relu(self.a(x))
        z = self.pool(y)
        other = self.pool(F.relu(self.b(y)))
        return z + other + y.mean()


class Repeated(nn.Module):
    """One convolution, ReLU and pooling three times over."""

    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        for _ in range(3):
            x = self.pool(self.relu(self.conv(x)))
        return x


class SharedReLU(nn.Module):
    """A ReLU module that also works elsewhere: only this chain's call of it may go."""

    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(self.relu(self.a(x)))
        return self.relu(self.b(x) + x)


class Residual(nn.Module):
    fused = frozenset({CONV_BN})

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.extra = None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        if self.extra is not None:
            out = self.extra(out)
        return self.relu(out)


class AcrossModules(nn.Module):
    """The pooling stands in the parent, the ReLU is a function in the child."""

    fused = frozenset({CONV_BN})

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)), inplace=True)

    def __init__(self) -> None:
        super().__init__()
        self.block, self.pool = self.Block(), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.block(x))


class AddThenReLUPool(nn.Module):
    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 3, 3), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        y = self.pool(F.relu(self.conv(x)))
        return F.max_pool2d(F.relu(y + 1), 2)


class ReLUPoolModules(nn.Module):
    fused = frozenset({RELU})

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Linear(20, 20), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.relu(self.conv(x) + x))


class NormFirst(nn.Sequential):
    """Pre-activation order: the normalisation comes before the convolution."""

    fused = frozenset({BN})

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3))


class ModeDependent(nn.Module):
    """A forward that differs between training and evaluation, with a chain in both."""

    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aux = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        if self.training:
            return x.mean((2, 3)) + self.aux(x).mean()
        return x.mean((2, 3))


class DataDependent(nn.Module):
    """Control flow that no trace can follow around a child that can be fused."""

    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.MaxPool2d(2))])

    def forward(self, x):
        if x.sum() > -1e9:
            x = self.block(x)
        for block in self.blocks:
            if x.shape[-1] > 4:
                x = block(x)
        return x


class DynamicShapes(nn.Module):
    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x, *, scale: float = 2.0):
        n, height = x.shape[0], x.size(2)
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return x.reshape(n, -1) * scale / height


class Replaced(nn.Module):
    """Layers reached through an alias outside of the module tree."""

    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)
        self.layers = [self.conv, nn.ReLU(), self.pool]

    def forward(self, x):
        return self.layers[2](F.relu(self.layers[0](x)))


class PreHooked(nn.Sequential):
    reason = "forward_pre_hooks"

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self[0].register_forward_pre_hook(double_input)


def double_input(module, args):
    return (args[0] * 2,)


class Asymmetric(nn.Sequential):
    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, (3, 2), stride=(1, 2), padding="valid", padding_mode="reflect"), nn.ReLU(),
            nn.MaxPool2d((2, 3), ceil_mode=True), nn.Conv2d(8, 8, 2, padding="same"), nn.ReLU(), nn.AvgPool2d(2),
        )  # fmt: skip


AWKWARD = [
    Plain, PoolBeforeReLU, ConvThenPool, Normalised, Rising, Functional, Branches, Repeated, SharedReLU, Residual,
    AcrossModules, AddThenReLUPool, ReLUPoolModules, NormFirst, ModeDependent, DataDependent, DynamicShapes,
    Asymmetric,
]  # fmt: skip


class Walker(nn.Module):
    """Calls one child as a whole and walks through the layers of another."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.walked = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x):
        x = self.called(x)
        kept = []
        for number, layer in enumerate(self.walked):
            x = layer(x)
            if number in (1, 2):
                kept.append(x.mean())
        return x + kept[0] + kept[1]


# ---- Left alone -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """conv, ReLU, pool, and something in the way that a subclass adds."""

    reason = ""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.relu(self.conv(x)))


class Hooked(Block):
    reason = "forward_hooks"

    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda module, args, output: output * 2)


class HookedPool(Block):
    reason = "forward_hooks"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Identity()
        self.pool.register_forward_hook(lambda module, args, output: output * 2)


class BackwardHooked(Block):
    reason = "backward_hooks"

    def __init__(self) -> None:
        super().__init__()
        self.conv.register_full_backward_hook(lambda module, grad_input, grad_output: None)


class Parametrised(Block):
    reason = "parametrisations"

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)


class Spectral(Block):
    reason = "parametrisations"

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.conv)


class OldWeightNorm(Block):
    reason = "must have the parameters weight and bias and no others"

    def __init__(self) -> None:
        super().__init__()
        nn.utils.weight_norm(self.conv)


class Pruned(Block):
    reason = "must have the parameters weight and bias and no others"

    def __init__(self) -> None:
        super().__init__()
        nn.utils.prune.l1_unstructured(self.conv, "weight", 0.5)


class Subclassed(Block):
    reason = "may do something of its own"

    class Conv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    def __init__(self) -> None:
        super().__init__()
        self.conv = self.Conv(3, 3, 3)


class Indices(Block):
    reason = "return_indices"

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)


class Dilated(Block):
    reason = "dilation"

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, dilation=2)


class SharedConv(Block):
    """Called twice, with different layers after it: each call is a chain of its own, or none."""

    fused = frozenset({CONV})

    def forward(self, x):
        return self.pool(self.relu(self.conv(x))).mean() + self.conv(x)


class SharedWeight(Block):
    """Two names for one convolution in different modules."""

    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(self.conv)


class Coin(Block):
    reason = r"branches on `random.random\(\) < 0.5`"

    def forward(self, x):
        x = self.conv(x)
        if random.random() < 0.5:
            x = self.relu(x)
        return self.pool(x)


class Remembers(Block):
    reason = "writes `self.seen`"

    def forward(self, x):
        self.seen = self.conv(x)
        return self.pool(self.relu(self.seen))


class Collects(Block):
    reason = "calls `self.all.append`"

    def __init__(self) -> None:
        super().__init__()
        self.all = []

    def forward(self, x):
        x = self.conv(x)
        self.all.append(x)
        return self.pool(self.relu(x))


class TrainsOtherwise(Block):
    reason = "differs between training and evaluation"

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x) if self.training else F.avg_pool2d(x, 2)


class WithoutGradients(Block):
    reason = "runs under"

    def forward(self, x):
        with torch.no_grad():
            x = F.relu(self.conv(x))
        return F.max_pool2d(x, 2)


class Decorated(Block):
    reason = "decorated"

    @torch.no_grad()
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)


class Noise(Block):
    reason = "draws numbers"

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return x + torch.randn(3, 1, 1)


class Optional(Block):
    reason = "branches on `mask is not None`"

    def forward(self, x, mask=None):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        if mask is not None:
            x = x * mask
        return x


class Patched(Block):
    reason = "forward was replaced"

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.conv.forward


class InPlaceOnInput(nn.Module):
    reason = "in place"

    def forward(self, x):
        return F.max_pool2d(F.relu(x, inplace=True), 2) + x.mean()

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class Synchronised(nn.Sequential):
    reason = "SyncBatchNorm"

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3), nn.SyncBatchNorm(3), nn.ReLU())


class SiLU(nn.Sequential):
    reason = "SiLU is not fused"

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3), nn.SiLU(), nn.MaxPool2d(2))


class NothingToGain(nn.Sequential):
    reason = "nothing to gain"

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))


class NoChain(nn.Sequential):
    reason = "no convolution"

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.Tanh())


AWKWARD += [SharedConv, SharedWeight]
# The convolution stays; ReLU and pooling after it become one.
CONV_LEFT_ALONE = [Hooked, BackwardHooked, Parametrised, Spectral, OldWeightNorm, Pruned, Subclassed, PreHooked]
LEFT_ALONE = [
    HookedPool, Indices, Dilated, Coin, Remembers, Collects, TrainsOtherwise,
    WithoutGradients, Decorated, Noise, Optional, Patched, InPlaceOnInput, Synchronised, SiLU, NothingToGain, NoChain,
]  # fmt: skip
