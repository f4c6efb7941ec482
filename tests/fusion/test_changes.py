"""What is changed after `dlfast.fuse` has the effect that it has on the plain model."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

import dlfast
from dlfast.fusion import NotFusedWarning
from dlfast.fusion.api import is_fused
from tests.fusion.blocks import Block
from tests.fusion.helpers import layers, recorded, small_images
from tests.support.native import needs_native

pytestmark = needs_native


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
    changed = "Attribute.use_pool was True and is False now"

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x) if self.use_pool else x

    def change(self):
        self.use_pool = False


class Nested(Flagged):
    changed = "Nested.cfg.pools was True and is False now"

    def forward(self, x):
        x = self.relu(self.conv(x))
        if self.cfg.pools:
            x = self.pool(x)
        return x

    def change(self):
        self.cfg.pools = False


class InList(Flagged):
    changed = r"InList.order was \['relu'\] and is \[\] now"

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
    changed = "Presence.last was 'a layer' and is None now"

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x) if self.last is not None else x

    def change(self):
        self.last = None


@pytest.mark.parametrize("kind", [Attribute, Nested, InList, InDict, Presence], ids=lambda kind: kind.__name__)
def test_a_flag_that_changed_is_followed(kind):
    torch.manual_seed(0)
    model = kind().double()
    fused = dlfast.fuse(model)
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with recorded() as ran:
            torch.testing.assert_close(each(small_images()), model(small_images()))
        assert ran == ["conv"]
        each.change()
        with pytest.warns(NotFusedWarning, match=kind.changed), recorded() as ran:
            have = each(small_images())
        assert ran == []
        torch.testing.assert_close(have, dlfast.unfuse(each)(small_images()), rtol=0, atol=0)


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
def test_a_layer_that_was_replaced_runs(what):
    make, path, new = REPLACED[what]
    fused = dlfast.fuse(make().double())
    assert list(fused.state_dict()) == list(make().state_dict())
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        each(small_images())
        each.set_submodule(path, new().double())
        plain = copy.deepcopy(dlfast.unfuse(each))
        assert not is_fused(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotFusedWarning)
            torch.testing.assert_close(each(small_images()), plain(small_images()))


def test_what_has_changed_is_said_once():
    fused = dlfast.fuse(layers())
    fused[1] = nn.GELU()
    with pytest.warns(NotFusedWarning, match="at '0' of Sequential runs as plain PyTorch: 1 is another layer now"):
        fused(small_images().float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(small_images().float())


OPTIONS = {
    "stride": lambda m: setattr(m[2], "stride", 1),
    "size": lambda m: setattr(m[2], "kernel_size", 3),
    "convolution's stride": lambda m: setattr(m[0], "stride", (2, 2)),
    "convolution's padding": lambda m: setattr(m[0], "padding", (0, 0)),
    "bias": lambda m: setattr(m[0], "bias", None),
    "order": lambda m: m.insert(1, nn.GELU()),
    "more": lambda m: m.append(nn.Tanh()),
    "less": lambda m: m.__delitem__(2),
    "forward of a layer": lambda m: setattr(m[1], "forward", torch.sigmoid),
    "hook": lambda m: m[1].register_forward_hook(lambda module, args, output: output * 2),
    "hook before": lambda m: m[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "hook on gradients": lambda m: m[1].register_full_backward_hook(lambda module, gi, go: (gi[0] * 2,)),
    "pruning": lambda m: torch.nn.utils.prune.l1_unstructured(m[0], "weight", 0.5),
    "weight norm": lambda m: torch.nn.utils.parametrizations.weight_norm(m[0]),
    "weight norm of old": lambda m: torch.nn.utils.weight_norm(m[0]),
    "child": lambda m: m[1].add_module("observer", nn.Identity()),
}


@pytest.mark.filterwarnings("ignore::dlfast.NotFusedWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("what", OPTIONS)
def test_what_is_done_to_a_layer_has_its_effect(what):
    torch.manual_seed(0)
    model = layers().double()
    fused, plain = dlfast.fuse(copy.deepcopy(model)), model
    results = []
    for each in (fused, plain):
        each(small_images())
        OPTIONS[what](each)
        x = small_images().requires_grad_()
        output = each(x)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in each.parameters())])
    torch.testing.assert_close(*results)


def test_what_says_nothing_of_the_computation_changes_nothing():
    """Marks that scripts put on layers, hooks of state_dict, modes of layers without one."""
    fused = dlfast.fuse(layers())
    fused[0].tag = torch.ones(3)
    fused[1].name = "relu"
    fused[1].eval()
    fused[2].register_state_dict_pre_hook(lambda *args: None)
    for _ in range(2):
        fused[0].tag = torch.zeros(3)
        with recorded() as ran:
            fused(small_images().float())
        assert ran == ["conv"]


def test_a_hook_that_is_taken_away_again():
    fused = dlfast.fuse(layers())
    handle = fused[1].register_forward_hook(lambda *args: None)
    with pytest.warns(NotFusedWarning, match="it has forward_hooks"), recorded() as ran:
        fused(small_images().float())
    assert ran == []
    handle.remove()
    with recorded() as ran:
        fused(small_images().float())
    assert ran == ["conv"]


def test_a_forward_that_was_replaced_is_refused():
    fused = dlfast.fuse(Functional())
    inner = fused.forward
    fused.forward = lambda x: inner(x).float()
    with pytest.raises(RuntimeError, match=r"the forward of .the model. was replaced since dlfast\.fuse"):
        dlfast.unfuse(fused)
    fused.forward = inner
    assert "forward" not in dlfast.unfuse(fused).__dict__


@pytest.mark.parametrize("make", [layers, Functional])
def test_replicas_are_plain(make):
    fused = pickle.loads(pickle.dumps(dlfast.fuse(make())))
    for module in fused.modules():  # as torch.nn.parallel.replicate does
        replica = module._replicate_for_data_parallel()
        assert not is_fused(replica)
        assert type(replica) is type(module)


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
    for mode in (True, False):
        for x in (small_images(), small_images()[0]):
            results = []
            for each in (fused.train(mode), model.train(mode)):
                torch.manual_seed(1)
                with recorded() as ran, warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    results.append(each(x))
                assert len(ran) == (each is fused and not (mode and x.dim() == 3))
            torch.testing.assert_close(*results)
