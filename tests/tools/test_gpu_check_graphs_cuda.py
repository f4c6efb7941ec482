"""What gpu_check does with graphs, on a device: real ones on a GPU, recorded ones on the emulator."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from dlfast.app.bench.traffic import Layer
from tests.support.recorded_graph import use_recorded_graphs
from tools.cuda.gpu_check import blocks, measure, networks, training

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", ["lenet", "mnistnet", pytest.param("speed run", marks=pytest.mark.gpu_only)])
def test_graphed_steps_of_both_sides_come_to_the_losses_of_plain_ones(name, monkeypatch):
    if "emulator" in torch.cuda.get_device_name():
        use_recorded_graphs(monkeypatch)
    monkeypatch.setattr(training, "CALLS", 1)
    network = networks.networks()[name]
    network = replace(network, shape=(4, *network.shape[1:]))
    failures, problems = measure.attempt(functools.partial(training.against_plain, name, network, "cuda"), rounds=2)
    assert failures == []
    assert len(problems) == 2


@pytest.fixture(autouse=True)
def settings():
    """Those of PyTorch stay as they are for other tests."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [each.allow_tf32 for each in flags]
    yield
    for each, value in zip(flags, before, strict=True):
        each.allow_tf32 = value


@pytest.mark.parametrize("products", ["float16", "float32"])
def test_kernels_of_blocks_are_timed_in_graphs(products, monkeypatch):
    """Every variant is captured; none of it is left to the calls themselves."""
    if "emulator" in torch.cuda.get_device_name():
        use_recorded_graphs(monkeypatch)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    layer = Layer("net", "conv", 2, 16, 32, 12)
    failures, (problem,) = measure.attempt(functools.partial(blocks.trials, layer, products, "cuda"), rounds=2)
    assert failures == []
    assert len(set(map(id, replays))) == len(problem["rows"]) == 10
