"""Bytes that each way of running a block must move: the formulas, the committed table, PyTorch's own sequence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dlfast.app import cli
from dlfast.app.bench import traffic
from dlfast.app.bench.traffic import Layer
from dlfast.models import NETWORKS, build

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_committed_table_is_what_the_formulas_give(tmp_path, capsys):
    assert cli.main(["bench", "bytes", "--out", str(tmp_path)]) == 0
    assert "Computed, not measured" in capsys.readouterr().out
    for name in ("bytes.md", "bytes.json"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text(), f"dlfast bench bytes --out {RESULTS}"
    assert json.loads((tmp_path / "bytes.json").read_text())["computed, not measured"] is True


def test_bytes_measures_nothing_beside_others(capsys):
    assert cli.main(["bench", "bytes", "lenet"]) == 2
    assert "bench bytes measures no time" in capsys.readouterr().err


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_those_of_the_networks(name):
    """Sizes from a forward pass of the model itself."""
    model = build(name, fused=False)
    network = NETWORKS[name]
    sizes = {}
    for layer_name in model.convs:
        conv = model.get_submodule(layer_name)
        conv.register_forward_hook(lambda _, x, y, at=layer_name: sizes.update({at: (x[0].shape, y.shape)}))
    model(torch.randn(1, network.in_channels, network.input_size, network.input_size))
    found = [layer for layer in traffic.layers() if layer.network == name]
    assert [layer.name for layer in found] == model.convs
    for layer in found:
        input, output = sizes[layer.name]
        assert tuple(input[1:]) == (layer.c, layer.h, layer.h)
        assert tuple(output[1:]) == (layer.k, layer.convolved(), layer.convolved())
        weight = model.get_submodule(layer.name).weight
        assert traffic.Sizes.of(layer, 4).w == weight.numel() * 4


def test_vgg16_has_its_weights():
    layers = [layer for layer in traffic.layers() if layer.network == "vgg16"]
    assert sum(layer.k * layer.c * layer.kernel**2 + layer.k for layer in layers) == 14_714_688
    assert layers[-1].pooled() == 7


def test_eager_moves_the_full_resolution_output_six_and_eight_times():
    """Of a layer whose other tensors are small beside it."""
    layer = Layer("", "", n=1, c=1, k=256, h=128, needs_grad_input=False)
    sizes = traffic.Sizes.of(layer, 2)
    eager, epilogue, single = traffic.eager(layer, 2), traffic.epilogue(layer, 2), traffic.single(layer, 2)
    pooled = sizes.p + sizes.index
    assert sum(kernel.bytes for kernel in eager.forward) - pooled == pytest.approx(6 * sizes.t, rel=0.01)
    assert sum(kernel.bytes for kernel in eager.backward) - pooled == pytest.approx(7 * sizes.t, rel=0.01)
    pooled = sizes.p + sizes.code
    assert sum(kernel.bytes for kernel in epilogue.forward) - pooled == pytest.approx(2 * sizes.t, rel=0.01)
    assert single is not None
    assert sum(kernel.bytes for kernel in single.forward) == pytest.approx(traffic.compulsory(layer, 2), rel=0.01)


def test_overlapping_windows_have_no_single_kernel():
    stem = next(layer for layer in traffic.layers() if layer.network == "resnet")
    assert stem.pooled() == 56
    assert traffic.single(stem, 2) is None
    row = next(row for row in traffic.rows(2) if row.network == "resnet")
    assert row.forward["single"] is None


def operators(layer: Layer, device: str) -> list[str]:
    """What PyTorch runs for a block, forward and backward, by the profiler's names."""
    x = torch.randn(layer.n, layer.c, layer.h, layer.h, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(layer.needs_grad_input)
    conv = torch.nn.Conv2d(layer.c, layer.k, layer.kernel, padding=layer.padding).to(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = F.max_pool2d(F.relu(conv(x)), layer.pool_size)
        y.backward(torch.ones_like(y))
    return [event.name.removeprefix("aten::") for event in profile.events()]


@pytest.mark.cuda
def test_eager_is_the_sequence_that_pytorch_runs():
    """Each kernel of the table is an operator that PyTorch calls on a CUDA device, in this order."""
    layer = Layer("", "", n=2, c=4, k=8, h=8)
    run = operators(layer, "cuda")
    operator = {
        "convolution": "cudnn_convolution", "add bias": "add_", "relu": "relu", "max pool": "max_pool2d_with_indices",
        "max pool backward": "max_pool2d_with_indices_backward", "fill with zeros": "zero_",
        "relu backward": "threshold_backward", "convolution, grad_input": "convolution_backward",
        "convolution, grad_weight": "convolution_backward",
    }  # fmt: skip
    step = traffic.eager(layer, 4)
    names = [kernel.name for kernel in (*step.forward, *step.backward)]
    names.remove("sum for grad_bias")  # inside convolution_backward, by a way that calls no operator
    if "emulator" in torch.cuda.get_device_name():  # which has no cuDNN: its convolution takes the bias
        names = names[2:]
    zeros = names.index("fill with zeros")
    names[zeros : zeros + 2] = ["max pool backward", "fill with zeros"]  # inside the operator that scatters into them
    assert {operator[name] for name in names} <= set(run), run
    at = [run.index(operator[name]) for name in names]
    assert at == sorted(at), (names, at, run)
