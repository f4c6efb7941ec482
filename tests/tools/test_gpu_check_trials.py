"""What gpu_check measures, on the CPU and small: that it runs, what fails, and what is kept then."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch

import dlfast
from dlfast.app.bench.problems import Variant
from dlfast.app.bench.traffic import Layer
from tools.cuda.gpu_check import blocks, events, kernels, measure, networks, report, steps, training, trial
from tools.cuda.gpu_check.networks import Mode
from tools.cuda.gpu_check.results import Key, Results

LENET = replace(networks.networks()["lenet"], shape=(2, 3, 32, 32))
SPEED_RUN = replace(networks.networks()["speed run"], shape=(4, 3, 32, 32))


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Those of PyTorch stay as they are for other tests."""
    monkeypatch.setattr(training, "CALLS", 1)
    before = [getattr(flags, name) for flags, name in FLAGS]
    yield
    for (flags, name), value in zip(FLAGS, before, strict=True):
        setattr(flags, name, value)


CUDNN = torch.backends.cudnn
FLAGS = [
    (CUDNN, "benchmark"), (CUDNN, "deterministic"), (CUDNN, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32"),
]  # fmt: skip


@pytest.mark.parametrize("network", [LENET, SPEED_RUN], ids=["float32", "bfloat16"])
def test_networks_are_measured_in_every_mode(network):
    modes = [*training.EAGER, *training.GRAPHED]
    make = functools.partial(training.in_modes, "network", network, modes, "cpu")
    failures, (problem,) = measure.attempt(make, rounds=2)
    assert failures == []
    assert [row["variant"] for row in problem["rows"]] == [
        "PyTorch", "PyTorch channels_last", "dlfast", "dlfast channels_last",
        "PyTorch graphed channels_last", "dlfast graphed channels_last",
    ]  # fmt: skip
    assert [row["peak_bytes"] is None for row in problem["rows"]] == [False] * 4 + [True] * 2
    assert all(0 < row["low"] <= row["high"] for row in problem["rows"])
    assert problem["name"] == f"network, batch {network.shape[0]}, {'TF32' if network is LENET else 'bfloat16'}"
    (ratio,) = problem["ratios"]
    assert [ratio[side].partition(" ")[0] for side in ("ours", "theirs")] == ["dlfast", "PyTorch"]


def test_modes_train_alike_and_ours_run_our_operators():
    """Losses over a few steps, by every mode from the same weights."""
    for network in (LENET, SPEED_RUN):
        network = replace(network, lower=False)
        model, images, labels = training.prepared(network, "cpu")
        losses = []
        for mode in [*training.EAGER, *training.GRAPHED]:
            step = networks.Training(network, model, images, labels, mode)
            with dlfast.ran.watch() as ran:
                losses.append([float(step()) for _ in range(2)])
            assert bool(ran) is mode.ours, mode
        assert losses[0][0] != losses[0][1]
        for values in losses[1:]:
            torch.testing.assert_close(values, losses[0], rtol=1e-3, atol=1e-3)


def test_all_models_of_torchvision_are_there():
    """The classifier has as many classes as there are labels."""
    every = networks.networks()
    assert set(every) >= {*training.TO_COMPILE, *training.TO_COMPARE, "googlenet", "mobilenet_v3_large"}
    with torch.device("meta"):
        for name, network in every.items():
            model = network.make().train()
            images = torch.empty(2, *network.shape[1:])
            assert model(images).shape == (2, network.classes), name


def test_compiled_modes_are_compiled(monkeypatch):
    modes = []

    def compiled(model, mode):
        modes.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    make = functools.partial(training.in_modes, "lenet", LENET, training.COMPILED, "cpu")
    failures, (problem,) = measure.attempt(make, rounds=2)
    assert failures == []
    assert modes == [None, "reduce-overhead", None, "reduce-overhead"]
    assert [row["peak_bytes"] is None for row in problem["rows"]] == [False, True, False, True]


def test_a_variant_of_ours_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    def refused(*_):
        raise RuntimeError("cannot be captured\nat line 3")

    monkeypatch.setattr(dlfast, "graphed_step", refused)
    modes = [Mode(False), Mode(True), *training.GRAPHED]
    failures, (problem,) = measure.attempt(functools.partial(training.in_modes, "lenet", LENET, modes, "cpu"), rounds=2)
    ours, theirs = (
        f"{side} graphed channels_last fails: RuntimeError: cannot be captured" for side in ("dlfast", "PyTorch")
    )
    assert failures == [f"lenet, batch 2, TF32, {ours}"]
    assert problem["notes"] == [theirs, ours]
    assert [row["variant"] for row in problem["rows"]] == ["PyTorch channels_last", "dlfast channels_last"]


def test_a_side_without_a_variant_is_a_failure():
    def fails():
        raise RuntimeError("out of memory")

    def make():
        found = trial.Trial("block", [])
        trial.add(found, "PyTorch", False, fails)
        trial.add(found, "dlfast", True, lambda: Variant("dlfast", True, {"forward": list}))
        yield found

    failures, (problem,) = measure.attempt(make, rounds=2)
    assert failures == ["block: no variant of PyTorch runs"]
    assert problem["notes"] == ["PyTorch fails: RuntimeError: out of memory"]
    assert problem["rows"] == []


def test_what_was_measured_before_an_error_is_kept():
    def make():
        yield trial.Trial("first", [Variant(name, name == "dlfast", {"step": list}) for name in ("dlfast", "PyTorch")])
        raise ValueError("no more")

    failures, measured = measure.attempt(make, rounds=2)
    assert failures == ["ValueError: no more"]
    assert [problem["name"] for problem in measured] == ["first"]


def test_graphed_steps_are_compared_and_timed_against_plain_ones():
    failures, problems = measure.attempt(functools.partial(training.against_plain, "lenet", LENET, "cpu"), rounds=2)
    assert failures == []
    assert [(ratio["ours"], ratio["theirs"]) for problem in problems for ratio in problem["ratios"]] == [
        ("dlfast graphed channels_last", "dlfast channels_last"),
        ("PyTorch graphed channels_last", "PyTorch channels_last"),
    ]


@pytest.mark.parametrize(
    ("graphed", "plain", "said"),
    [
        ([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], None),
        ([4.0, 4.0, 3.0, 2.0], [4.0, 3.0, 2.0, 1.0], "those of plain ones"),
        ([4.0, 3.0, float("nan"), 1.0], [4.0, 3.0, 2.0, 1.0], "those of plain ones"),
        ([4.0, 4.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0], "too much the same"),
    ],
)
def test_losses_that_differ_or_stand_still_are_refused(graphed, plain, said):
    steps = [functools.partial(next, iter([torch.tensor(loss) for loss in losses])) for losses in (graphed, plain)]
    CUDNN.benchmark = True
    if said is None:
        training.compare(*steps)
    else:
        with pytest.raises(AssertionError, match=said):
            training.compare(*steps)
    assert CUDNN.benchmark
    assert not CUDNN.deterministic


@pytest.mark.parametrize("products", blocks.PRODUCTS)
def test_blocks_are_measured_by_every_algorithm(products):
    layer = Layer("net", "conv", 2, 3, 8, 12)
    failures, (problem,) = measure.attempt(functools.partial(blocks.trials, layer, products, "cpu"), rounds=2)
    assert failures == []
    assert problem["name"] == f"net conv, batch 2, {products}"
    variants = ["dlfast", "dlfast pytorch", "dlfast single", "PyTorch", "PyTorch channels_last"]
    assert [(row["quantity"], row["variant"]) for row in problem["rows"]] == list(
        itertools.product(["forward", "forward + backward"], variants)
    )
    assert CUDNN.allow_tf32 is (products != "float32")


def test_seconds_are_of_one_call_of_those_that_are_captured(monkeypatch):
    """Graphs are pretended: a replay calls what was captured."""
    calls = []

    def captured(call, count):
        return lambda: [call() for _ in range(count)]

    monkeypatch.setattr(measure, "captured", captured)
    seconds = [0.4, 0.8]
    monkeypatch.setattr(measure.protocol, "alternate", lambda steps, *_, **__: [[value] * 2 for value in seconds])
    variants = [Variant(name, name == "dlfast", {"forward": lambda: calls.append(0)}) for name in ("dlfast", "PyTorch")]
    problem = measure.measure(trial.Trial("block", variants, captured=4), rounds=2)
    assert [row["seconds"] for row in problem["rows"]] == [0.1, 0.2]
    assert problem["ratios"][0]["median"] == 2.0
    variants[0].calls["forward"]()
    assert len(calls) == 4


def test_what_cannot_be_captured_is_named(monkeypatch):
    def captured(call, count):
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(measure, "captured", captured)
    found = trial.Trial("block", [Variant("dlfast", True, {"forward": list})], captured=4)
    assert measure.measure(found, rounds=2)["rows"] == []
    assert "block, dlfast: cannot be captured: RuntimeError: not permitted" in found.failures[0]


def test_steps_are_measured():
    failures, problems = measure.attempt(steps.makers("cpu")["optimizers, lenet"], rounds=2)
    assert failures == []
    assert [problem["name"].partition(" (")[0] for problem in problems] == ["SGD, lenet", "AdamW, lenet"]
    (found, *_) = steps.makers("cpu")["overhead"]()
    assert found.calls == 200


def test_measuring_tells_of_each_item_and_ends_after_a_failure(tmp_path, monkeypatch):
    """A broken CUDA context would make the rest fail as well."""
    path = tmp_path / "events"
    monkeypatch.setenv(events.FILE, str(path))
    monkeypatch.setenv("DLFAST_CACHE_DIR", "")
    good, bad = functools.partial(blocks.trials, Layer("n", "c", 2, 3, 8, 12), "float32", "cpu"), iter
    monkeypatch.setattr(measure, "MEASURED", {"blocks": lambda _: {"good": good, "bad": bad, "last": good}})
    monkeypatch.setattr(measure, "ROUNDS", 2)
    assert measure.main("blocks", ["good", "bad", "last"]) == 1
    said = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("begin") or line["end"] for line in said] == ["good", "good", "bad", "bad"]
    assert [line["outcome"] for line in said if "end" in line] == ["passed", "failed"]
    assert said[3]["reason"].startswith("TypeError: ")
    results = Results(tmp_path / "blocks.json", Key("chip", "driver", "torch", "commit"))
    for line in said[1::2]:
        results.record(line.pop("end"), **line)
    page = report.write(tmp_path, {"GPU": "chip"}, {"blocks": results}).read_text()
    assert "1 passed, 1 failed." in page
    rows = [line for line in page.splitlines() if line.startswith("| n c, batch 2, float32 |")]
    assert len(rows) == 10
    assert sum("x (" in row for row in rows) == 2


def test_every_verb_lists_what_it_measures_without_making_it():
    for verb, makers in measure.MEASURED.items():
        found = makers("cpu")
        assert found, verb
        assert all(callable(make) for make in found.values())
    assert len(measure.MEASURED["blocks"]("cpu")) == len(blocks.LAYERS) * len(blocks.PRODUCTS)


def test_every_kind_of_kernel_has_a_step_that_runs(capsys):
    """What the sanitizers watch, on the CPU: each step, each operator, each optimizer."""
    kernels.main("cpu")
    said = capsys.readouterr().out
    assert said.endswith("all steps have run\n")
    for operator in ("conv_relu_pool2d", "relu_pool2d", "batch_norm_relu_pool2d"):
        for part in (
            ("forward", "backward") if operator != "conv_relu_pool2d" else ("forward", "grad_input", "grad_weight")
        ):
            assert f"{operator} {part} " in said
    public = {name for name in dlfast.optim.__all__ if isinstance(getattr(dlfast.optim, name), type)}
    assert set(kernels.OPTIMIZERS) == {
        name for name in public if issubclass(getattr(dlfast.optim, name), torch.optim.Optimizer)
    }


@pytest.mark.cuda
def test_the_sanitizers_watch_our_kernels(capsys):
    """On the emulator, or on a GPU: the single kernel computes each part of a convolution in each dtype."""
    kernels.main("cuda")
    said = capsys.readouterr().out.splitlines()
    for dtype in ("float16", "bfloat16", "float32", "fma"):
        ran = said[said.index(f"convolutions, single, {dtype} ...") + 1]
        for part in ("forward", "grad_input", "grad_weight"):
            assert f"conv_relu_pool2d {part} single" in ran
