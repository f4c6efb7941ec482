"""`dlfast.verify` finds what is wrong, and `dlfast.explain` tells what is done and left alone."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlfast
from dlfast.fusion.run import ChainRun
from tests.fusion.blocks import Coin, Hooked
from tests.fusion.helpers import example_of, recorded
from tests.fusion.models import AWKWARD, Plain
from tests.support.native import needs_native

pytestmark = needs_native


@pytest.mark.parametrize("kind", AWKWARD, ids=lambda kind: kind.__name__)
def test_awkward_models_are_verified(kind):
    torch.manual_seed(0)
    model = kind()
    before = [p.clone() for p in model.parameters()]
    found = dlfast.verify(model, example_of(model))
    assert found.ok, str(found)
    assert found.fused
    assert {d.mode for d in found.differences} == {"training", "evaluation"}
    assert any(d.quantity.startswith("grad of") for d in found.differences)
    assert str(found).startswith("equal up to rounding")
    for have, want in zip(model.parameters(), before, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("mistake", ["window", "activation", "weight", "statistics"])
def test_finds_a_mistake(mistake, monkeypatch):
    torch.manual_seed(0)
    model = dlfast.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)), inplace=True)
    x = torch.randn(4, 3, 12, 12)
    assert dlfast.verify(model, x).ok
    (chain,) = model.forward.chains
    if mistake == "window":
        chain.window = replace(chain.window, pool_stride=(1, 2))
    elif mistake == "activation":
        chain.window = replace(chain.window, activation=None)
    elif mistake == "weight":
        other = nn.BatchNorm2d(8)
        nn.init.constant_(other.weight, 1.00001)
    else:
        other = nn.BatchNorm2d(8, eps=1.1e-5)
    if mistake in ("weight", "statistics"):
        whole = ChainRun._fused

        def wrong(run, input):
            other.to(input.dtype).train(run.bn.layer.training)
            with mock.patch.object(run.bn, "_layer", return_value=other):
                return whole(run, input)

        monkeypatch.setattr(ChainRun, "_fused", wrong)
    if mistake == "window":
        with pytest.raises(RuntimeError, match="size"):
            dlfast.verify(model, x)
        return
    found = dlfast.verify(model, x)
    assert not found.ok
    assert "NOT EQUAL" in str(found)


def test_nothing_to_verify():
    found = dlfast.verify(nn.Linear(3, 3), torch.randn(2, 3))
    assert found.ok
    assert not found.fused
    assert "nothing of this model is fused" in str(found)


def test_explain_of_a_model(capsys):
    model = Plain()
    shown = dlfast.explain(model, example_of(model))
    (row,) = shown.rows
    assert row[:2] == ("0", "conv → relu → max 2x2")
    # The ReLU's output in float32 and indices of 8 bytes, less a byte each: 2x8 images of 18x18, pooled 9x9.
    assert shown.bytes_saved == 16 * (18 * 18 * 4 + 9 * 9 * 7)
    assert "0.02 MB" in str(shown) or "0.03 MB" in str(shown)
    fused = dlfast.fuse(model, example_of(model), verbose=True)
    assert "conv" in capsys.readouterr().out
    again = dlfast.explain(fused, example_of(model))
    assert again.fused
    assert [r[0] for r in again.rows] == ["0"]
    with recorded() as ran:
        fused(example_of(model))
    assert ran == ["conv"]  # nothing was changed


def test_explain_of_what_is_left_alone():
    text = str(dlfast.explain(Coin()))
    assert "branches on `random.random() < 0.5`" in text
    text = str(dlfast.explain(Hooked()))
    assert "left alone: conv (conv): it has forward_hooks" in text
    text = str(dlfast.explain(Plain().to("meta")))
    assert "nothing is fused: its parameters are on the meta device" in text
    with pytest.raises(TypeError, match="must be a torch"):
        dlfast.explain(3)


def test_bytes_saved_are_those_measured():
    from dlfast.app.measure import saved_bytes

    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(4, 3, 30, 30)
    fused = dlfast.fuse(model, x)
    less = saved_bytes(model, x) - saved_bytes(fused, x)
    told = dlfast.explain(model, x).bytes_saved
    # Batch statistics of a few channels, and storages that two tensors share, are not counted.
    assert told == pytest.approx(less, rel=0.1)


class Unfused(nn.Module):
    """Activations that the kernels do not have, as a layer and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()
        self.second = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = F.max_pool2d(self.act(self.bn(self.conv(x))), 2)
        return F.max_pool2d(F.hardswish(self.second(x)), 2)


def test_explain_tells_why_a_chain_is_no_longer():
    text = str(dlfast.explain(Unfused()))
    assert "no longer: conv (conv → bn): SiLU is not fused" in text
    assert "left alone: second (conv): hardswish is not fused" in text
    assert "no longer" not in str(dlfast.explain(Plain()))
