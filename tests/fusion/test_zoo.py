"""Every classification model of torchvision, fused, against itself: a dozen always, all of them with
``DLFAST_ZOO=all`` (about half an hour on two cores).
"""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
from torch import nn

import dlfast
from dlfast.fusion import NotFusedWarning
from tests.support.native import needs_native

torchvision = pytest.importorskip("torchvision")

ALL = torchvision.models.list_models(module=torchvision.models)
# One of each family that has something to fuse, and one that has not.
DOZEN = [
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnext50_32x4d", "googlenet", "squeezenet1_1", "densenet121",
    "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_x_400mf", "vit_b_32",
]  # fmt: skip
NAMES = ALL if os.environ.get("DLFAST_ZOO") == "all" else DOZEN
# Smallest images that the model accepts with more than one position left for its last normalisation.
SIZES = {"inception_v3": 160, "alexnet": 96}
LARGE = 150e6  # parameters: copies in float64 and three steps would need too much memory

pytestmark = needs_native


def build(name: str) -> nn.Module:
    options = {"aux_logits": False} if name in ("inception_v3", "googlenet") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torchvision.models.get_model(name, weights=None, **options)


def images(name: str) -> torch.Tensor:
    size = 224 if name.startswith(("vit", "maxvit", "swin")) else SIZES.get(name, 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def train(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    outputs = []
    for number in range(3):
        torch.manual_seed(number)
        optimizer.zero_grad()
        output = model(x)
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


def after_training(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What three steps give and leave behind, in float64."""
    found = {f"output of step {number}": output for number, output in enumerate(train(model, x))}
    found.update((key, value.double()) for key, value in model.state_dict().items())
    with torch.no_grad():
        found["output in evaluation"] = model.eval()(x)
    return found


def distances(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each, relative to its largest number."""
    assert list(have) == list(want)
    found = {}
    for key, value in want.items():
        assert torch.equal(have[key].isnan(), value.isnan()), key
        scale = value.abs().max().item() if value.numel() else 0.0
        found[key] = (have[key] - value).abs().max().item() / (scale + 1e-5) if value.numel() else 0.0
    return found


def drift(name: str, x: torch.Tensor, want: dict[str, torch.Tensor]) -> float:
    """How far three steps carry a change in the last digit of the parameters: some models multiply it by 10^12.

    Every number changes by itself: a whole kernel made larger is undone by the normalisation after it.
    """
    torch.manual_seed(0)
    model = build(name).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 4e-16 * torch.randn_like(p))
    return max(distances(after_training(model, x), want).values())


@pytest.mark.parametrize("examples", [False, True], ids=["", "with example"])
@pytest.mark.parametrize("name", NAMES)
def test_fused_equals_original(name, examples):
    torch.manual_seed(0)
    plain = build(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NotFusedWarning)
        fused = dlfast.fuse(plain, images(name).float() if examples else None)
    if fused is plain:
        assert any(issubclass(warning.category, NotFusedWarning) for warning in told)
        return
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    if sum(p.numel() for p in plain.parameters()) > LARGE:
        with torch.no_grad():
            x = images(name).float()
            torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-4)
        return
    fused, plain, x = copy.deepcopy(fused).double(), plain.double(), images(name)
    want = after_training(plain, x)
    found = distances(after_training(fused, x), want)
    worst = max(found, key=lambda key: found[key])
    # Float64 through a hundred layers and three steps; beyond, only as far as the model itself throws roundings.
    assert found[worst] < 1e-7 or found[worst] < 30 * drift(name, x, want), (worst, found[worst])
    back = dlfast.unfuse(fused)
    assert repr(back) == repr(plain)
