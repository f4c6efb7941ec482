"""``dlfast bench``: what it measures, prints and writes."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import sys
import types

import pytest
import torch

import dlfast
from dlfast.app import cli
from dlfast.app.bench import accuracy, gpu, layers, overhead, peers, problems, protocol, traffic
from dlfast.app.measure import alternate, peak_bytes
from tests.support.native import needs_native


@needs_native
@pytest.mark.slow
def test_network_table_json_and_figure(tmp_path, capsys):
    arguments = ["bench", "lenet", "--rounds", "3", "--no-compile", "--batch-size", "2", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "lenet.json").read_text())
    assert {row["quantity"] for row in report["rows"]} == {"forward", "training step"}
    assert {row["variant"] for row in report["rows"]} == {
        "dlfast", "dlfast channels_last", "PyTorch", "PyTorch channels_last",
    }  # fmt: skip
    for row in report["rows"]:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
    saved = {row["variant"]: row["saved_bytes"] for row in report["rows"] if row["quantity"] == "training step"}
    assert 0 < saved["dlfast"] < saved["PyTorch"]
    assert {"CPU", "threads", "torch", "load average before", "load average after"} <= set(report["machine"])
    assert (tmp_path / "lenet.png").read_bytes().startswith(b"\x89PNG")
    assert "above 1 dlfast is faster" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["vgg"], "vgg"),
        (["--rounds", "1"], "--rounds"),
        (["--threads", "0"], "--threads"),
        (["gpu", "--device", "cpu"], "bench gpu needs a CUDA device"),
        (["accuracy", "lenet"], "bench accuracy measures no time"),
    ],
)
def test_errors_of_use(arguments, named, capsys):
    try:
        status = cli.main(["bench", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert named in capsys.readouterr().err


def test_peak_bytes_counts_what_is_held_at_once():
    def step():
        first = torch.zeros(250_000)
        del first
        second = torch.zeros(500_000)
        return second.add(1)

    assert 4_000_000 <= peak_bytes(step) < 4_500_000


def test_ratio_compares_the_fastest_of_each_side():
    def variant(name, ours):
        return problems.Variant(name, ours, {"step": lambda: None})

    problem = problems.Problem("p", [variant("a", True), variant("b", False), variant("c", False)])
    seconds = {"a": [1.0, 1.0, 1.0], "b": [9.0, 9.0, 9.0], "c": [2.0, 3.0, 2.0]}
    ratio = protocol._ratio(problem, "step", seconds)
    assert (ratio.ours, ratio.theirs, ratio.median) == ("a", "c", 2.0)


def test_a_variant_that_cannot_compile_is_noted_and_others_are_raised():
    def fail():
        raise RuntimeError("no compiler\nsecond line")

    problem = problems.Problem("p", [])
    problems.add(problem, problems.Variant("PyTorch compile", False, {"step": fail}))
    assert problem.variants == []
    assert problem.notes == ["PyTorch compile does not run here: no compiler"]
    with pytest.raises(RuntimeError, match="no compiler"):
        problems.add(problem, problems.Variant("PyTorch", False, {"step": fail}))


def test_blocks_do_the_same_work_or_are_not_timed():
    block = layers.Block("", "small", 2, 3, 4, 8)
    conv, pool = block.modules()
    x = torch.randn(block.n, block.c, block.h, block.h)
    ours, plain = dlfast.nn.ConvReLUPool2d.from_modules(conv, pool), layers.Plain(conv, pool)
    layers.check_equal(ours, plain, x)
    with pytest.raises(AssertionError):
        layers.check_equal(ours, layers.Plain(conv, None), x)


@needs_native
@pytest.mark.slow
def test_layers_under_the_roofline(tmp_path, monkeypatch, capsys):
    blocks = [layers.Block(layers.FIRST, "one", 2, 3, 8, 16), layers.Block(layers.WIDE, "two", 2, 16, 16, 12)]
    monkeypatch.setattr(layers, "BLOCKS", blocks)
    assert cli.main(["bench", "layers", "--rounds", "3", "--no-compile", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "layers.json").read_text())
    assert report["roofline"]["flops"] > 0
    for point in report["points"]:
        ratio = next(
            r for r in report["ratios"] if (r["problem"], r["quantity"]) == (point["problem"], point["quantity"])
        )
        least = max(point["flops"] / report["roofline"]["flops"], point["bytes"] / report["roofline"]["bandwidth"])
        assert ratio["of_roofline"] == pytest.approx(least / point["ours"])
    forward = next(point for point in report["points"] if point["quantity"] == "forward")
    assert forward["flops"] == 2 * 2 * 8 * 16 * 16 * 3 * 9
    assert "first layers, forward: geometric mean" in capsys.readouterr().out


def test_overhead_of_steps_and_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "CALLS", 3)
    assert cli.main(["bench", "overhead", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    steps = {"dlfast", "PyTorch for-loop", "PyTorch foreach", "PyTorch fused"}
    for name in ("SGD, 10 empty tensors", "AdamW, 10 empty tensors", "SGD, 10 tensors of one number"):
        assert {row["variant"] for row in rows if row["problem"] == name} == steps
    blocks = [row for row in rows if "1x1x8x8" in row["problem"]]
    assert {row["variant"] for row in blocks} == {"dlfast", "PyTorch"}
    assert {row["quantity"] for row in blocks} == {"forward", "forward + backward"}
    chains = [row for row in rows if "conv → " in row["problem"]]
    assert {row["problem"].split(",")[0] for row in chains} == {
        "conv → bn → relu", "conv → bn → relu → max pool", "conv → relu", "conv → relu → max pool"
    }  # fmt: skip
    assert len(chains) == (2 * 4 + 1) * 2
    assert len(rows) == 4 * 4 + 2 * 2 * 2 + len(chains)
    assert all(0 < row["seconds"] < 0.1 for row in rows)
    assert "optimizer step, step: geometric mean" in capsys.readouterr().out


def test_overhead_is_that_of_steps_that_are_taken():
    """Every variant changes the parameters and counts its steps; blocks leave gradients."""
    found = {problem.name: problem for problem in overhead.problems("cpu")}
    for algorithm in ("SGD", "AdamW"):
        for variant in found[f"{algorithm}, 10 tensors of one number"].variants:
            optimizer = variant.calls["step"].__self__
            (group,) = optimizer.param_groups
            before = [p.detach().clone() for p in group["params"]]
            variant.calls["step"]()
            assert all((p != b).all() for p, b in zip(group["params"], before, strict=True))
            assert len(before) == len(optimizer.state) == 10
    problem = found["3x3 block of 1x1x8x8, gradient of the input"]
    for variant in problem.variants:
        variant.calls["forward + backward"]()
        assert variant.input.grad.any()
        assert all(p.grad is not None for p in variant.module.parameters())


@pytest.mark.parametrize("pool", [None, torch.nn.MaxPool2d(2)], ids=["", "pooled"])
@pytest.mark.parametrize("normalised", [True, False])
def test_overhead_of_chains_is_of_the_same_work(normalised, pool):
    plain = overhead.layers_of(normalised, pool, "cpu")
    ours = overhead.fused(plain)
    x = torch.randn(2, overhead.CHANNELS, overhead.SIZE, overhead.SIZE)
    torch.testing.assert_close(ours(x), torch.nn.Sequential(*plain)(x))
    assert list(ours.parameters()) == [p for layer in plain for p in layer.parameters()]


@needs_native
@pytest.mark.parametrize("seed", [0, 1])
def test_accuracy_is_within_what_is_promised(seed):
    """By a bound that follows from the dtype and the number of terms; PyTorch's own algorithm differs between CPUs."""
    errors = list(accuracy.measure(seed))
    for error in errors:
        assert error.promised is None or error.relative <= error.promised, error
    assert {error.way for error in errors if error.promised is None} == {"PyTorch"}
    assert {error.way for error in errors if error.promised is not None} == set(accuracy.WAYS["forward"])


@needs_native
def test_accuracy_is_that_of_the_ways_it_names(monkeypatch):
    for part, ways in accuracy.WAYS.items():
        for way in ways:
            monkeypatch.setenv("DLFAST_ALGORITHM", way)
            taken = {getattr(plan_without_pooling(dtype), part) for dtype in accuracy.DTYPES}
            assert taken == {"sparse" if way == "direct" and part != "forward" else way}


def plan_without_pooling(dtype):
    block = dlfast.nn.ConvReLUPool2d(64, 64, 3, padding=1, pool=None, activation=None, dtype=dtype)
    return dlfast.explain(block, torch.zeros(2, 64, 32, 32, dtype=dtype, requires_grad=True))


def test_accuracy_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "CHANNELS", (16,))
    assert cli.main(["bench", "accuracy", "--out", str(tmp_path)]) == 0
    ways = {error["way"] for error in json.loads((tmp_path / "accuracy.json").read_text())["errors"]}
    assert ways == {"PyTorch", *accuracy.WAYS["forward"]}
    assert "promised" in capsys.readouterr().out


def test_several_calls_are_timed_as_one():
    calls = []
    seconds = alternate([lambda: calls.append(0)], rounds=4, warmup=1, calls=10)
    assert len(calls) == 50
    assert len(seconds[0]) == 4


def test_blocks_of_the_gpu_benchmark(monkeypatch):
    """All but the device: every algorithm and PyTorch, that of the environment being as it was in between."""
    seen = []
    monkeypatch.setenv("DLFAST_ALGORITHM", "pytorch")
    layer = traffic.Layer("net", "conv", 2, 3, 8, 12)
    problem = gpu.block_problem(layer, torch.float32, "cpu", compile=False)
    assert problem.variants_by_name() == [
        "dlfast", "dlfast pytorch", "dlfast single", "PyTorch", "PyTorch channels_last",
    ]  # fmt: skip
    assert [variant.ours for variant in problem.variants] == [True, True, True, False, False]
    assert problem.moved == {"forward": traffic.compulsory(layer, 4)}
    original = dlfast.nn.ConvReLUPool2d.forward
    monkeypatch.setattr(
        dlfast.nn.ConvReLUPool2d, "forward",
        lambda self, x: seen.append(gpu.os.environ.get("DLFAST_ALGORITHM")) or original(self, x),
    )  # fmt: skip
    for variant in problem.variants:
        for call in variant.calls.values():
            call()
    assert seen == [None, None, "pytorch", "pytorch", "single", "single"]
    assert gpu.os.environ["DLFAST_ALGORITHM"] == "pytorch"


def test_other_libraries_are_compared_only_where_they_are(monkeypatch, capsys):
    monkeypatch.setattr(peers, "PEERS", [peer for peer in peers.PEERS if peer.label == "Apex"])
    assert cli.main(["bench", "peers", "--device", "cpu"]) == 2
    assert "none of them is installed" in capsys.readouterr().err
    assert list(peers.problems(["lenet"], "cuda")) == []
    for name in ("apex", "apex.optimizers", "amp_C"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["apex.optimizers"].FusedSGD = torch.optim.SGD
    sys.modules["apex.optimizers"].FusedAdam = lambda p, adam_w_mode, **options: torch.optim.AdamW(p, **options)
    monkeypatch.setattr(peers, "PEERS", [dataclasses.replace(peer, devices=("cpu",)) for peer in peers.PEERS])
    found = list(peers.problems(["lenet"], "cpu"))
    assert [problem.name for problem in found] == ["SGD, lenet", "AdamW, lenet"]
    for problem in found:
        assert problem.variants_by_name() == ["dlfast", "PyTorch fused", "Apex"]
        for variant in problem.variants:
            variant.calls["plain step"]()


def test_a_library_that_takes_another_step_or_none_is_not_timed(monkeypatch):
    def peer(build):
        monkeypatch.setattr(torch.optim, "Other", build, raising=False)
        monkeypatch.setattr(peers, "PEERS", [peers.Peer("other", peers.ADAMW, "torch.optim", "Other", {})])
        return next(peers.problems(["lenet"], "cpu"))

    def broken(parameters, **options):
        raise RuntimeError("no kernel for this machine")

    problem = peer(broken)
    assert problem.variants_by_name() == ["dlfast", "PyTorch fused"]
    assert problem.notes == ["other does not run here: no kernel for this machine"]
    with pytest.raises(AssertionError, match="the step of other"):
        peer(torch.optim.SGD)


@needs_native
def test_no_problem_begins_after_the_time_is_up(tmp_path):
    arguments = ["bench", "lenet", "mnistnet", "--rounds", "2", "--no-compile", "--batch-size", "1", "--device", "cpu"]
    assert cli.main([*arguments, "--at-most", "0", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "lenet-mnistnet.json").read_text())
    assert {row["problem"] for row in report["rows"]} == {"lenet, batch 1"}
    assert any("what comes after lenet, batch 1 was not measured" in note for note in report["notes"])
