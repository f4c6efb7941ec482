"""What is changed after `dlfast.fuse`: the fused model follows, or refuses by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fuse_models import Block, layers, small_images
from torch import nn

import dlfast
from dlfast import _native
from dlfast.fusion import NotFusedWarning
from dlfast.fusion.api import is_fused

pytestmark = pytest.mark.skipif(_native.native.module is None, reason="needs the compiled extension")


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
        torch.testing.assert_close(each(small_images()), model(small_images()))
        each.change()
        with pytest.raises(RuntimeError, match=kind.changed):
            each(small_images())
        plain = dlfast.unfuse(each)
        with torch.no_grad():
            z = plain.conv(small_images())
        assert plain(small_images()).shape in ((2, 3, 6, 6), z.shape)  # as the flag says now


class Scaled(Flagged):
    def forward(self, x):
        return self.pool(self.relu(self.conv(x))) * self.scale


def test_a_number_that_the_forward_still_reads_is_followed():
    model = Scaled().double()
    fused = dlfast.fuse(model)
    before = fused(small_images())
    fused.scale = 3.0
    torch.testing.assert_close(fused(small_images()), before * 1.5)


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
    "first of a Sequential": (layers, "0", lambda: nn.Conv2d(3, 3, 1)),
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
        each(small_images())
        each.set_submodule(path, new().double())
        with pytest.raises(RuntimeError, match=rf"{path.split('.')[-1]} is not the layer that was fused, but .*unfuse"):
            each(small_images())
        plain = dlfast.unfuse(each)
        assert not is_fused(plain)
        plain(small_images())


def test_an_option_of_an_absorbed_layer_is_refused():
    fused = dlfast.fuse(layers())
    with pytest.raises(RuntimeError, match="stride of a MaxPool2d that is part of a fused layer cannot be changed"):
        fused[2].stride = 1
    fused[2].stride = fused[2].stride
    fused.eval()
    assert not fused[2].training
    plain = dlfast.unfuse(fused)
    plain[2].stride = 1
    assert plain.double()(small_images()).shape == (2, 3, 11, 11)


def test_a_layer_put_between_is_refused():
    fused = dlfast.fuse(layers())
    fused.insert(1, nn.GELU())
    with pytest.raises(RuntimeError, match="1 is not the layer that was fused, but GELU"):
        fused(small_images().float())


# ---- Classes that changed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("take_back", [dlfast.unfuse, dlfast.explain, lambda m: dlfast.verify(m, small_images())])
def test_a_layer_that_has_another_class_by_now_is_refused(take_back):
    fused = dlfast.fuse(nn.Sequential(layers(), nn.Flatten()).double())
    nn.utils.parametrizations.weight_norm(fused[0][0])
    want = fused(small_images())
    with pytest.raises(RuntimeError, match=r"fused layer '0.0' is a Parametrized\w+ by now, no ConvReLUPool2d"):
        take_back(fused)
    torch.testing.assert_close(fused(small_images()), want)
    nn.utils.parametrize.remove_parametrizations(fused[0][0], "weight")
    torch.testing.assert_close(dlfast.unfuse(fused)(small_images()), want)


def test_a_forward_that_was_replaced_is_refused():
    fused = dlfast.fuse(Functional())
    inner = fused.forward
    fused.forward = lambda x: inner(x).float()
    with pytest.raises(RuntimeError, match=r"the forward of .the model. was replaced since dlfast\.fuse"):
        dlfast.unfuse(fused)
    fused.forward = inner
    assert "forward" not in dlfast.unfuse(fused).__dict__


@pytest.mark.parametrize("make", [layers, Functional])
def test_replicas_are_refused_by_name(make):
    fused = pickle.loads(pickle.dumps(dlfast.fuse(make())))
    with pytest.raises(RuntimeError, match=r"cannot be replicated by nn\.DataParallel"):
        [module._replicate_for_data_parallel() for module in fused.modules()]  # as torch.nn.parallel.replicate does
    [module._replicate_for_data_parallel() for module in dlfast.unfuse(fused).modules()]


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
    torch.testing.assert_close(fused(small_images()), model(small_images()))
    assert "forward" not in dlfast.unfuse(fused).__dict__


# ---- Input without a batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(nn.Conv2d(3, 4, 3), nn.ReLU()), (nn.Tanh(), nn.ReLU())], ids=["conv", "relu"])
def test_dropout_of_channels_before_a_maximum(layers):
    """On input without a batch Dropout2d zeroes rows, which is not the same before and after the maximum."""
    model = nn.Sequential(nn.Linear(12, 12), *layers, nn.Dropout2d(0.5), nn.MaxPool2d(2)).double()
    fused = dlfast.fuse(model)
    assert is_fused(fused)
    assert repr(fused[3]) == "Dropout2d(p=0.5, inplace=False)"
    fused(small_images())
    with pytest.raises(RuntimeError, match=r"expected 4D input in training \(got 3D input\)"):
        fused(small_images()[0])
    fused.eval(), model.eval()
    torch.testing.assert_close(fused(small_images()[0]), model(small_images()[0]))
    assert type(dlfast.unfuse(fused)[3]) is nn.Dropout2d
