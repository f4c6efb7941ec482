"""Layers of a chain that somebody else runs too, by themselves: nothing of that changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dlfast
from tests.fusion.blocks import Block
from tests.fusion.helpers import layers, recorded, small_images
from tests.support.native import needs_native

pytestmark = needs_native


# ---- Layers that work elsewhere too ------------------------------------------------------------------------


class CallsAgain(nn.Module):
    """A forward without a trace that calls a layer of a chain in its child."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.block = layers()
        self.again = self.block[1 if layer == "relu" else 2]

    def forward(self, x):
        x = self.block(x)
        if x.sum() > 1e9:
            x = x * 2
        return self.again(x - 0.1)


class Lists(nn.Module):
    """The same, through a list that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = layers()
        self.layers = [self.block[1]]

    def forward(self, x):
        x = self.block(x)
        return self.layers[0](x - 0.1) if x.sum() < 1e9 else x


class Walks(nn.Module):
    """Runs the layers of a Sequential one by one and keeps what each gives."""

    def __init__(self, index: bool) -> None:
        super().__init__()
        self.block, self.index = layers(), index

    def forward(self, x):
        kept = []
        if x.sum() > 1e9:
            x = x * 2
        if self.index:
            x = self.block[0](x)
            kept.append(x.mean())
            x = self.block[1](x)
        else:
            for layer in self.block:
                x = layer(x)
                kept.append(x.mean())
        return torch.stack(kept)


@pytest.mark.parametrize(
    "make", [lambda: CallsAgain("relu"), lambda: CallsAgain("pool"), Lists, lambda: Walks(True), lambda: Walks(False)],
    ids=["relu", "pool", "list", "index", "loop"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::dlfast.NotFusedWarning")
def test_a_forward_without_a_trace_calls_a_layer_of_a_chain(make):
    torch.manual_seed(0)
    model = make().double()
    with recorded() as ran:
        torch.testing.assert_close(dlfast.fuse(model)(small_images()), model(small_images()))
    assert len(ran) == (not isinstance(model, Walks))


class Tail(nn.Module):
    """A block that ends without pooling, called by a forward with a trace and by one without."""

    class Inner(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.pool = block, nn.MaxPool2d(2)

        def forward(self, x):
            return self.pool(self.block(x))

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
        self.inner = self.Inner(self.block)

    def forward(self, x):
        return self.inner(x).mean() + self.block(x).mean() if x.sum() < 1e9 else x


@pytest.mark.filterwarnings("ignore::dlfast.NotFusedWarning")
def test_a_block_that_others_call_does_not_take_the_pooling_after_it():
    torch.manual_seed(0)
    model = Tail().double()
    torch.testing.assert_close(dlfast.fuse(model)(small_images()), model(small_images()))


def test_a_block_with_the_pooling_after_it_gives_what_it_gave():
    """Its last chain takes the pooling in that call alone, and not where a hook looks at what the block gives."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    model = nn.Sequential(block, nn.MaxPool2d(2)).double()
    fused, x = dlfast.fuse(model), small_images()
    for mode in (True, False):
        fused.train(mode), model.train(mode)
        with recorded() as ran:
            torch.testing.assert_close(fused(x), model(x))
        assert ran == ["conv bn"]
        torch.testing.assert_close(fused[0](x), model[0](x))
        seen = []
        handle = fused[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))  # noqa: B023
        torch.testing.assert_close(fused(x), model(x))
        assert seen == [(2, 3, 10, 10)]
        handle.remove()
    fused[0].forward = lambda x: x * 2
    torch.testing.assert_close(fused(x), nn.functional.max_pool2d(x * 2, 2))


def test_a_hook_on_a_block_sees_what_the_block_gives():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), nn.MaxPool2d(2)).double()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    dlfast.fuse(model)(small_images())
    assert seen == [(2, 3, 10, 10)]


# ---- Methods beside forward --------------------------------------------------------------------------------


class Intermediates(Block):
    def forward_intermediates(self, x):
        x = self.conv(x)
        kept = [x]
        x = self.relu(x)
        return [*kept, x]


class Training(Block):
    def training_step(self, batch):
        return self.relu(self.conv(batch)).mean()


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = layers()

    def forward(self, x):
        return self.features(x)

    def walk(self, x):
        for layer in self.features:
            x = layer(x)
            yield x


class Sliced(Features):
    walk = None

    @property
    def first(self):
        return self.features[:1]


class Named(Features):
    walk = None

    def run(self, x):
        for _, layer in self.features.named_children():
            x = layer(x)
        return x


class ByName(Block):
    def run(self, x):
        for name in ("conv", "relu"):
            layer = getattr(self, name)
            x = layer(x)
        return x


METHODS = {
    Intermediates: lambda m, x: m.forward_intermediates(x),
    Training: lambda m, x: m.training_step(x),
    Features: lambda m, x: list(m.walk(x)),
    Sliced: lambda m, x: m.first(x),
    Named: lambda m, x: m.run(x),
    ByName: lambda m, x: m.run(x),
}


@pytest.mark.parametrize("kind", METHODS)
def test_a_method_that_runs_layers_one_by_one(kind):
    torch.manual_seed(0)
    model = kind().double()
    fused, x = dlfast.fuse(model), small_images()
    with recorded() as ran:
        fused(x)
    assert len(ran) == 1
    torch.testing.assert_close(METHODS[kind](fused, x), METHODS[kind](model, x))


# ---- Layers that other models hold -------------------------------------------------------------------------


class WithDefault(nn.Module):
    def __init__(self, act=nn.ReLU(), pool=nn.MaxPool2d(2)):  # noqa: B008
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), act, pool)
        self.act = act

    def forward(self, x):
        return self.act(self.block(x) - 0.1)


def test_in_place_other_models_with_the_same_activation_stay_as_they_were():
    torch.manual_seed(0)
    first, second = WithDefault().double(), WithDefault().double()
    second.load_state_dict(first.state_dict())
    want = second(small_images())
    act = first.act
    fused = dlfast.fuse(first, inplace=True)
    with recorded() as ran:
        torch.testing.assert_close(fused(small_images()), want)
        torch.testing.assert_close(second(small_images()), want)
    assert ran == ["conv bn"]
    assert fused.act is act is second.act
    assert type(act) is nn.ReLU
    assert not [name for name in vars(act) if "dlfast" in name]
    assert repr(dlfast.unfuse(fused)) == repr(second)


def test_in_place_layers_that_another_model_runs_too():
    torch.manual_seed(0)
    model = layers().double()
    other = nn.Sequential(*list(model)[:2])
    want = other(small_images())
    fused = dlfast.fuse(model, inplace=True)
    with recorded() as ran:
        fused(small_images())
        torch.testing.assert_close(other(small_images()), want)
    assert ran == ["conv"]
