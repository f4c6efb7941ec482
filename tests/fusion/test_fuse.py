"""Models that were rewritten against themselves: awkward ones, and what must stay as it was."""

from __future__ import annotations

import copy
import pickle
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlfast
from dlfast.fusion import NotFusedWarning
from dlfast.fusion.api import is_fused
from dlfast.fusion.survey import survey
from tests.fusion.blocks import CONV_LEFT_ALONE, LEFT_ALONE
from tests.fusion.helpers import CONV_BN, RELU, example_of, recorded
from tests.fusion.models import AWKWARD, Plain
from tests.support.native import needs_native

pytestmark = needs_native


def independent(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    torch.manual_seed(5)
    random.seed(5)
    optimizer.zero_grad()
    output = model(x)
    output = output[0] if isinstance(output, tuple) else output
    output.square().mean().backward()
    optimizer.step()
    return [output.detach().clone()]


def assert_alike(fused: nn.Module, plain: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    """Training steps, then evaluation, then training again: outputs, parameters and buffers stay equal."""
    assert list(fused.state_dict()) == list(plain.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (fused, plain)]
    for mode in (True, False, True):
        fused.train(mode)
        plain.train(mode)
        for _ in range(steps):
            for have, want in zip(step(fused, x, optimizers[0]), step(plain, x, optimizers[1]), strict=True):
                torch.testing.assert_close(have, want)
        with torch.no_grad():
            torch.manual_seed(3)
            random.seed(3)
            have = fused(x)
            torch.manual_seed(3)
            random.seed(3)
            torch.testing.assert_close(have, plain(x))
    for (name, have), want in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(have, want, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("examples", [False, True], ids=["", "with example"])
@pytest.mark.parametrize("kind", AWKWARD, ids=lambda kind: kind.__name__)
def test_awkward_models(kind, examples):
    torch.manual_seed(0)
    model = kind().double()  # so that no maximum is decided by rounding
    plain = independent(model)
    x = example_of(model).double()
    fused = dlfast.fuse(model, x if examples else None)
    assert fused is not model
    assert is_fused(fused)
    assert not is_fused(model)
    assert [p is q for p, q in zip(fused.parameters(), model.parameters(), strict=True)]
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    with recorded() as ran:
        assert_alike(fused, plain, x)
    assert kind.fused <= set(ran), ran


@pytest.mark.parametrize("kind", AWKWARD, ids=lambda kind: kind.__name__)
def test_unfuse_gives_the_plain_model_back(kind):
    model = kind()
    before = repr(model)
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    fused = dlfast.fuse(model, inplace=True)
    assert fused is model
    assert repr(model) == before
    assert any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        fused.eval()(example_of(model))
    plain = dlfast.unfuse(fused)
    assert is_fused(fused)
    assert not is_fused(plain)
    assert repr(plain) == before
    assert {name: sorted(module.__dict__) for name, module in plain.named_modules()} == attributes
    assert all(p is q for p, q in zip(plain.parameters(), fused.parameters(), strict=True))
    assert dlfast.unfuse(fused, inplace=True) is fused
    assert repr(fused) == before


@pytest.mark.parametrize("kind", CONV_LEFT_ALONE, ids=lambda kind: kind.__name__)
def test_convolution_left_alone_and_the_rest_fused(kind):
    torch.manual_seed(0)
    model, plain = kind().double(), kind().double()
    plain.load_state_dict(model.state_dict())
    reasons = [chain.why_not for chain in survey(model).refused]
    assert any(re.search(kind.reason, reason) for reason in reasons), reasons
    fused = dlfast.fuse(model, inplace=True)
    with recorded() as ran:
        assert_alike(fused, plain, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert set(ran) == {RELU}


@pytest.mark.parametrize("kind", LEFT_ALONE, ids=lambda kind: kind.__name__)
def test_left_alone_with_a_reason(kind):
    torch.manual_seed(0)
    model = kind()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    with pytest.warns(NotFusedWarning, match=kind.reason):
        assert dlfast.fuse(model) is model
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == attributes
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_only_what_is_safe_of_a_model():
    """An untraceable forward, whose traceable child is fused; what it walks through stays plain layers."""
    from tests.fusion.models import Walker

    torch.manual_seed(0)
    model = Walker().double()
    plain = independent(model)
    fused = dlfast.fuse(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with recorded() as ran:
        fused(x)
    assert len(ran) == 1
    assert_alike(fused, plain, x)


@pytest.mark.parametrize("kind", AWKWARD, ids=lambda kind: kind.__name__)
def test_copies_and_pickles(kind):
    torch.manual_seed(0)
    model = kind().eval()
    x = example_of(model)
    fused = dlfast.fuse(model)
    with torch.no_grad():
        want = fused(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(other(x), want)
            parameters = list(other.parameters())
            assert not any(p is q for p, q in zip(parameters, fused.parameters(), strict=True))
            for parameter in parameters:  # nothing in the copy leads to the original
                parameter.zero_()
            torch.testing.assert_close(fused(x), want)
            assert repr(dlfast.unfuse(other)) == repr(model)


def test_saved_and_loaded(tmp_path):
    model = dlfast.fuse(Plain())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = example_of(model)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    plain = Plain()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))
    model.load_state_dict(Plain().state_dict())


def test_optimizer_made_before_keeps_working():
    torch.manual_seed(0)
    model = Plain().double()
    plain = independent(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain)]
    x = example_of(model).double()
    step(model, x, optimizers[0]), step(plain, x, optimizers[1])
    fused = dlfast.fuse(model)
    for _ in range(2):
        step(fused, x, optimizers[0]), step(plain, x, optimizers[1])
    for have, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(have, want)


def test_dropout_stays_random_and_follows_the_mode():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return F.dropout(F.max_pool2d(F.relu(self.conv(x)), 2), 0.5, training=self.training)

    fused = dlfast.fuse(Dropping())
    x = torch.randn(2, 3, 10, 10)
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x))
    fused.train()
    assert (fused(x) == 0).float().mean() > 0.4


def test_a_constant_that_changed_is_followed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.scale = 2.0

        def forward(self, x):
            return F.max_pool2d(F.relu(self.conv(x)), 2) * self.scale

    model = dlfast.fuse(Scaled(), inplace=True)
    x = torch.randn(2, 3, 10, 10)
    model(x)
    model.scale = 3.0
    plain = dlfast.unfuse(model)
    with pytest.warns(NotFusedWarning, match=r"Scaled.scale was 2.0 and is 3.0 now"):
        torch.testing.assert_close(model(x), plain(x))
    with recorded() as ran:
        torch.testing.assert_close(dlfast.fuse(plain)(x), plain(x))
    assert len(ran) == 1


def test_bad_input():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got int"):
        dlfast.fuse(3)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        dlfast.unfuse("model")
    with pytest.raises(TypeError, match="must not be compiled"):
        dlfast.fuse(torch.compile(Plain()))
    compiled = Plain()
    compiled.compile()
    with pytest.raises(TypeError, match="must not be compiled"):
        dlfast.fuse(compiled)
    model = Plain()
    with pytest.raises(ValueError, match="example_inputs do not fit the model: RuntimeError"):
        dlfast.fuse(model, torch.randn(2, 4, 8, 8), inplace=True)
    assert not is_fused(model)
    assert all(module.training for module in model.modules())


def test_example_inputs_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout())
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    fused = dlfast.fuse(model, torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in fused] == [True, False, True, True, True]
    assert not any(module._forward_pre_hooks for module in model.modules())
    for key, value in fused.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("examples", [False, True])
def test_a_layer_that_is_not_initialised(examples):
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.MaxPool2d(2))
    with pytest.warns(NotFusedWarning, match="its LazyConv2d '0' is not initialised: run the model once first"):
        assert dlfast.fuse(model, x if examples else None) is model
    model(x)
    fused = dlfast.fuse(model, x if examples else None)
    with recorded() as ran:
        torch.testing.assert_close(fused(x), model(x))
    assert ran == [CONV_BN]


@pytest.mark.parametrize("where", ["meta", "scripted", "fused"])
def test_unusual_models_come_back_unchanged(where):
    model: nn.Module = Plain()
    if where == "meta":
        model = model.to("meta")
    elif where == "scripted":
        model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)))
    else:
        model = dlfast.fuse(model)
    reason = {"meta": "meta device", "scripted": "scripted", "fused": "already fused"}[where]
    with pytest.warns(NotFusedWarning, match=reason):
        assert dlfast.fuse(model) is model


def test_frozen_normalisation_is_folded_only_without_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).double()
    nn.init.normal_(model[1].weight)
    plain = independent(model)
    fused = dlfast.fuse(model)
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    for each in (fused, plain):
        each.train()
        each[1].eval()
        each(x).square().sum().backward()
    for have, want in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad)
    torch.testing.assert_close(fused[1].running_mean, plain[1].running_mean)


# ---- Adaptive pooling --------------------------------------------------------------------------------------


class AdaptiveFunctional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return F.adaptive_avg_pool2d(F.relu(self.conv(x)), (3, None))


ADAPTIVE = {
    "avg": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3)),
    "max": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d((3, 6))),
    "no relu": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveMaxPool2d((None, 4))),
    "functions": AdaptiveFunctional,
    "in the parent": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(3)),
}


@pytest.mark.parametrize("what", ADAPTIVE)
def test_adaptive_pooling_that_is_ordinary_at_the_size_of_the_example(what):
    torch.manual_seed(0)
    model = ADAPTIVE[what]().double()
    plain = independent(model)
    x = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    assert "only with example inputs" in survey(model).refused[0].why_not
    fused = dlfast.fuse(model, x)
    with recorded() as ran:
        assert_alike(fused, plain, x)
    assert "conv" in ran
    for height, width in ((14, 26), (11, 17), (5, 9)):  # ordinary again, not ordinary, more out than in
        other = torch.randn(2, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(fused(other), plain(other))
    torch.testing.assert_close(fused(x[0]), plain(x[0]))
    assert repr(dlfast.unfuse(fused)) == repr(model)


def test_adaptive_pooling_that_is_not_ordinary_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(5))
    with pytest.warns(NotFusedWarning, match=r"the adaptive pooling is no ordinary one at \(12, 12\)"):
        assert dlfast.fuse(model, torch.randn(2, 3, 14, 14)) is model


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.AvgPool2d(2)], ids=repr)
@pytest.mark.parametrize("examples", [False, True], ids=["", "with example"])
def test_a_pooling_in_the_parent_that_no_normalised_block_takes(pool, examples):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(nn.Sequential(*layers), pool, nn.Flatten()).double()
    plain = independent(model)
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    fused = dlfast.fuse(model, x if examples else None)
    with recorded() as ran:
        assert_alike(fused, plain, x)
    assert set(ran) == {CONV_BN}


def test_several_devices():
    """All but the meta device, which is told of by its own name."""

    class Device(torch.Tensor):
        """Says that it is elsewhere."""

        device = torch.device("cuda", 0)

    model = Plain()
    model.register_buffer("scale", torch.ones(2).as_subclass(Device))
    assert survey(model).why_not == "its parameters are on several devices: cpu, cuda:0"
    with pytest.warns(NotFusedWarning, match="on several devices: cpu, cuda:0"):
        assert dlfast.fuse(model) is model
