"""What is changed after `dlfast.fuse`, or used from elsewhere: the fused model follows, or refuses by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlfast
from dlfast import _native
from dlfast.fusion import NotFusedWarning
from dlfast.fusion.api import is_fused
from dlfast.fusion.survey import survey

pytestmark = pytest.mark.skipif(_native.native.module is None, reason="needs the compiled extension")


def images() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def block(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), *more)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.relu(self.conv(x)))


# ---- Layers that work elsewhere too ------------------------------------------------------------------------


class CallsAgain(nn.Module):
    """A forward without a trace that calls a layer of a chain in its child."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.block = block()
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
        self.block = block()
        self.layers = [self.block[1]]

    def forward(self, x):
        x = self.block(x)
        return self.layers[0](x - 0.1) if x.sum() < 1e9 else x


class Walks(nn.Module):
    """Runs the layers of a Sequential one by one and keeps what each gives."""

    def __init__(self, index: bool) -> None:
        super().__init__()
        self.block, self.index = block(), index

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
    torch.testing.assert_close(dlfast.fuse(model)(images()), model(images()))


def test_what_only_generated_code_can_leave_out_still_fuses():
    assert type(dlfast.fuse(CallsAgain("relu")).block[0]) is dlfast.nn.ConvReLUPool2d


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
    torch.testing.assert_close(dlfast.fuse(model)(images()), model(images()))


def test_a_hook_on_a_block_sees_what_the_block_gives():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), nn.MaxPool2d(2)).double()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    dlfast.fuse(model)(images())
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
        self.features = block()

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


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Intermediates, "Intermediates.forward_intermediates"), (Training, "Training.training_step"),
        (Features, "Features.walk"), (Sliced, "Sliced.first"), (Named, "Named.run"), (ByName, "ByName.run"),
    ],
)  # fmt: skip
def test_a_method_that_runs_layers_one_by_one(kind, method):
    model = kind()
    with pytest.warns(NotFusedWarning, match=rf"{method} may run its layers one by one"):
        assert dlfast.fuse(model) is model


class Harmless(Features):
    """What classes do with their layers without running them."""

    walk = None

    def __init__(self) -> None:
        super().__init__()
        for layer in self.features:
            layer.train()
        self._initialize()

    def _initialize(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight)

    def freeze(self):
        for layer in self.features:
            layer.requires_grad_(False)
        self.features[0].weight.requires_grad = True

    def first(self):
        return self.features[0]

    def forward_features(self, x):
        return self.features(x)


def test_methods_that_run_no_layers_are_no_reason():
    assert [chain.why_not for chain in survey(Harmless()).chains] == [""]


# ---- Flags -------------------------------------------------------------------------------------------------


class Config:
    def __init__(self) -> None:
        self.pools = True


class Flagged(Block):
    def __init__(self) -> None:
        super().__init__()
        self.use_pool, self.cfg, self.order, self.options = True, Config(), ["relu"], {"pool": True}
        self.last, self.scale = nn.Identity(), 2.0


class Attribute(Flagged):
    changed = "Attribute.use_pool was True .* and is now False"

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x) if self.use_pool else x

    def change(self):
        self.use_pool = False


class Nested(Flagged):
    changed = "Nested.cfg.pools was True .* and is now False"

    def forward(self, x):
        x = self.relu(self.conv(x))
        if self.cfg.pools:
            x = self.pool(x)
        return x

    def change(self):
        self.cfg.pools = False


class InList(Flagged):
    changed = r"InList.order was \['relu'\] .* and is now \[\]"

    def forward(self, x):
        x = self.conv(x)
        for _ in self.order:
            x = self.relu(x)
        return self.pool(x)

    def change(self):
        self.order.clear()


class InDict(Flagged):
    changed = "InDict.options was"

    def forward(self, x):
        x = F.relu(self.conv(x))
        return F.max_pool2d(x, 2) * len(self.options)

    def change(self):
        self.options["more"] = 1


class Presence(Flagged):
    changed = "Presence.last was 'a layer' .* and is now None"

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x) if self.last is not None else x

    def change(self):
        self.last = None


@pytest.mark.parametrize("kind", [Attribute, Nested, InList, InDict, Presence], ids=lambda kind: kind.__name__)
def test_a_flag_that_changed_is_refused(kind):
    torch.manual_seed(0)
    model = kind().double()
    fused = dlfast.fuse(model)
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(each(images()), model(images()))
        each.change()
        with pytest.raises(RuntimeError, match=kind.changed):
            each(images())
        plain = dlfast.unfuse(each)
        with torch.no_grad():
            z = plain.conv(images())
        assert plain(images()).shape in ((2, 3, 6, 6), z.shape)  # as the flag says now


class Scaled(Flagged):
    def forward(self, x):
        return self.pool(self.relu(self.conv(x))) * self.scale


def test_a_number_that_the_forward_still_reads_is_followed():
    model = Scaled().double()
    fused = dlfast.fuse(model)
    before = fused(images())
    fused.scale = 3.0
    torch.testing.assert_close(fused(images()), before * 1.5)


class ChildMode(Flagged):
    """The mode of a child is not traced both ways."""

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x) if self.relu.training else x


def test_a_branch_on_the_mode_of_a_child_is_not_followed():
    with pytest.warns(NotFusedWarning, match=r"branches on `self.relu.training`"):
        dlfast.fuse(ChildMode())


POOLS = True


class Global(Flagged):
    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x) if POOLS else x


def test_a_branch_on_a_global_variable_is_not_followed():
    with pytest.warns(NotFusedWarning, match="branches on `POOLS`"):
        dlfast.fuse(Global())


# ---- Layers that are replaced ------------------------------------------------------------------------------


class Across(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.pool = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.block(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)


REPLACED = {
    "convolution": (Block, "conv", lambda: nn.Conv2d(3, 3, 5, bias=False)),
    "relu": (Block, "relu", nn.GELU),
    "pool": (Block, "pool", nn.Identity),
    "first of a Sequential": (block, "0", lambda: nn.Conv2d(3, 3, 1)),
    "normalisation": (Across, "block.1", lambda: nn.BatchNorm2d(3)),
    "pool in the parent": (Across, "pool", nn.Identity),
    "whole block": (Across, "block", lambda: nn.Conv2d(3, 3, 1)),
    "beside functions": (Functional, "conv", lambda: nn.Conv2d(3, 3, 1)),
    "between": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.LeakyReLU(), nn.MaxPool2d(2)), "1", lambda: nn.SiLU(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REPLACED)
def test_a_layer_that_was_replaced_is_refused(what):
    make, path, new = REPLACED[what]
    fused = dlfast.fuse(make().double())
    keys = list(fused.state_dict())
    assert keys == list(make().state_dict())
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        each(images())
        each.set_submodule(path, new().double())
        with pytest.raises(RuntimeError, match=rf"{path.split('.')[-1]} is not the layer that was fused, but .*unfuse"):
            each(images())
        plain = dlfast.unfuse(each)
        assert not is_fused(plain)
        plain(images())


def test_a_layer_put_between_is_refused():
    fused = dlfast.fuse(block())
    fused.insert(1, nn.GELU())
    with pytest.raises(RuntimeError, match="1 is not the layer that was fused, but GELU"):
        fused(images().float())


# ---- Classes that changed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("take_back", [dlfast.unfuse, dlfast.explain, lambda m: dlfast.verify(m, images())])
def test_a_layer_that_has_another_class_by_now_is_refused(take_back):
    fused = dlfast.fuse(nn.Sequential(block(), nn.Flatten()).double())
    nn.utils.parametrizations.weight_norm(fused[0][0])
    want = fused(images())
    with pytest.raises(RuntimeError, match=r"fused layer '0.0' is a Parametrized\w+ by now, no ConvReLUPool2d"):
        take_back(fused)
    torch.testing.assert_close(fused(images()), want)
    nn.utils.parametrize.remove_parametrizations(fused[0][0], "weight")
    torch.testing.assert_close(dlfast.unfuse(fused)(images()), want)


def test_a_forward_that_was_replaced_is_refused():
    fused = dlfast.fuse(Functional())
    inner = fused.forward
    fused.forward = lambda x: inner(x).float()
    with pytest.raises(RuntimeError, match=r"the forward of .the model. was replaced since dlfast\.fuse"):
        dlfast.unfuse(fused)
    fused.forward = inner
    assert "forward" not in dlfast.unfuse(fused).__dict__


def test_a_model_of_functions_alone_is_fused_and_taken_back():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x):
            return F.max_pool2d(torch.sigmoid(F.relu(self.linear(x) + x)), 2)

    model = Sums().double()
    fused = dlfast.fuse(model)
    assert is_fused(fused)
    torch.testing.assert_close(fused(images()), model(images()))
    assert "forward" not in dlfast.unfuse(fused).__dict__


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
    want = second(images())
    act = first.act
    fused = dlfast.fuse(first, inplace=True)
    assert type(fused.block[0]) is dlfast.nn.ConvBNReLUPool2d
    torch.testing.assert_close(fused(images()), want)
    torch.testing.assert_close(second(images()), want)
    assert fused.act is act is second.act
    assert type(act) is nn.ReLU
    assert not [name for name in vars(act) if "dlfast" in name]
    assert repr(dlfast.unfuse(fused)) == repr(second)


def test_in_place_relu_and_pool_held_elsewhere():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), act, nn.MaxPool2d(2)).double()
    plain = copy.deepcopy(model)
    fused = dlfast.fuse(model, inplace=True)
    torch.testing.assert_close(fused(images()), plain(images()))
    assert type(act) is nn.ReLU
    assert type(dlfast.fuse(plain)[2]) is dlfast.nn.ReLUPool2d  # a copy's belong to it alone


def test_in_place_layers_that_another_model_runs_too():
    model = block()
    other = nn.Sequential(*list(model)[:2])
    with pytest.warns(NotFusedWarning, match="also held outside of the model"):
        assert dlfast.fuse(model, inplace=True) is model
    del other
    assert is_fused(dlfast.fuse(model, inplace=True))


# ---- Input without a batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(nn.Conv2d(3, 4, 3), nn.ReLU()), (nn.Tanh(), nn.ReLU())], ids=["conv", "relu"])
def test_dropout_of_channels_before_a_maximum(layers):
    """On input without a batch Dropout2d zeroes rows, which is not the same before and after the maximum."""
    model = nn.Sequential(nn.Linear(12, 12), *layers, nn.Dropout2d(0.5), nn.MaxPool2d(2)).double()
    fused = dlfast.fuse(model)
    assert is_fused(fused)
    assert repr(fused[3]) == "Dropout2d(p=0.5, inplace=False)"
    fused(images())
    with pytest.raises(RuntimeError, match=r"expected 4D input in training \(got 3D input\)"):
        fused(images()[0])
    fused.eval(), model.eval()
    torch.testing.assert_close(fused(images()[0]), model(images()[0]))
    assert type(dlfast.unfuse(fused)[3]) is nn.Dropout2d
