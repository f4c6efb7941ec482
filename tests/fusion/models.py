"""Awkward models that `dlfast.fuse` must handle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from tests.fusion.blocks import SharedConv, SharedWeight
from tests.fusion.helpers import BN, CONV, CONV_BN, RELU


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


class Asymmetric(nn.Sequential):
    fused = frozenset({CONV})

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, (3, 2), stride=(1, 2), padding="valid", padding_mode="reflect"), nn.ReLU(),
            nn.MaxPool2d((2, 3), ceil_mode=True), nn.Conv2d(8, 8, 2, padding="same"), nn.ReLU(), nn.AvgPool2d(2),
        )  # fmt: skip


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


AWKWARD = [
    Plain, PoolBeforeReLU, ConvThenPool, Normalised, Rising, Functional, Branches, Repeated, SharedReLU, Residual,
    AcrossModules, AddThenReLUPool, ReLUPoolModules, NormFirst, ModeDependent, DataDependent, DynamicShapes,
    Asymmetric, SharedConv, SharedWeight,
]  # fmt: skip
