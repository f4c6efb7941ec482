"""A convolution, ReLU and pooling with something in the way: what `dlfast.fuse` must leave alone, and why."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from tests.fusion.helpers import CONV


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


class Aliased(nn.Module):
    """Layers reached through an alias outside of the module tree."""

    reason = "reads `self.layers`"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)
        self.layers = [self.conv, nn.ReLU(), self.pool]

    def forward(self, x):
        return self.layers[2](F.relu(self.layers[0](x)))


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


class PreHooked(nn.Sequential):
    reason = "forward_pre_hooks"

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self[0].register_forward_pre_hook(double_input)


def double_input(module, args):
    return (args[0] * 2,)


# The convolution stays; ReLU and pooling after it become one.
CONV_LEFT_ALONE = [Hooked, BackwardHooked, Parametrised, Spectral, OldWeightNorm, Pruned, Subclassed, PreHooked]
LEFT_ALONE = [
    HookedPool, Indices, Dilated, Coin, Remembers, Collects, TrainsOtherwise, WithoutGradients, Decorated, Noise,
    Optional, Patched, InPlaceOnInput, Aliased, Synchronised, SiLU, NothingToGain, NoChain,
]  # fmt: skip
