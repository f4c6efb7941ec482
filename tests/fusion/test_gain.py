"""What a chain is worth beside the host's time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dlfast
from dlfast.fusion.gain import HOST_SECONDS, LAYER_HOST_SECONDS, shapes_of, spare_the_host
from dlfast.fusion.survey import survey
from tests.support.native import built_for_cuda, needs_native

pytestmark = needs_native


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip


def images(device="cpu"):
    return torch.randn(2, 3, 16, 16, device=device)


def surveyed(saved, kernels):
    """The chains of a network whose normalisations take the host 0.2 ms, as on a GPU."""
    model = network()
    found = survey(model, shapes_of(model, (images(),)))
    costly = [chain for chain in found.fused if chain.bn is not None]
    assert [chain.name for chain in costly] == ["3", "6"]
    for chain, seconds in zip(costly, saved, strict=True):
        chain.host_seconds, chain.seconds_saved, chain.eager_seconds = 2e-4, seconds, kernels / 2
    return found, model


def test_the_cpu_has_no_host():
    model = network()
    found = survey(model, shapes_of(model, (images(),)))
    assert len(found.fused) == 3
    assert {chain.host_seconds for chain in found.chains} == {0.0}
    assert "host" not in str(dlfast.explain(model, images()))


def test_a_step_that_waits_for_the_host_gets_no_more_of_it():
    found, model = surveyed(saved=(5e-5, 1e-4), kernels=4e-4)
    spare_the_host(found.fused, model)
    assert [chain.name for chain in found.fused] == ["0"]
    assert all("which would take 0.2 ms longer" in chain.why_not for chain in found.refused if chain.bn)


def test_a_step_that_waits_for_the_gpu_is_fused_whole():
    found, model = surveyed(saved=(5e-5, 1e-4), kernels=1.0)
    spare_the_host(found.fused, model)
    assert [chain.name for chain in found.fused] == ["0", "3", "6"]


def test_where_the_host_has_time_for_one_it_is_the_best():
    found, model = surveyed(saved=(5e-5, 3e-4), kernels=9 * LAYER_HOST_SECONDS + 5e-4)
    for chain in found.fused[:1]:
        chain.choice, chain.seconds_saved = None, 0.0  # which counts on the CPU
    spare_the_host(found.fused, model)
    assert [chain.name for chain in found.fused] == ["0", "6"]


def test_in_evaluation_a_normalisation_spares_the_host():
    found, model = surveyed(saved=(5e-5, 1e-4), kernels=4e-4)
    spare_the_host(found.fused, model.eval())
    assert [chain.name for chain in found.fused] == ["0", "3", "6"]


@pytest.mark.cuda
@built_for_cuda
def test_small_images_on_a_gpu_wait_for_the_host(monkeypatch):
    model, x = network().cuda(), images("cuda")
    assert len(dlfast.explain(model, x).chains) == 3  # none takes the host longer than its layers
    monkeypatch.setitem(HOST_SECONDS, "bn", 2.1e-4)
    told = dlfast.explain(model, x)
    assert [chain.name for chain in told.chains if chain.bn is not None] == []
    assert "a training step waits for the host" in str(told)
    told = dlfast.explain(model.eval(), x)
    assert [chain.name for chain in told.chains if chain.bn is not None] == ["3", "6"]
    assert "0.21 ms more of the host" in str(told)
    assert len(dlfast.explain(model.train()).chains) == 3  # without inputs nothing is known
