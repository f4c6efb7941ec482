"""``dlfast bench``: what it measures, prints and writes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dlfast import cli
from dlfast.bench import problems, protocol
from dlfast.measure import peak_bytes


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
    [(["vgg"], "vgg"), (["--rounds", "1"], "--rounds"), (["--threads", "0"], "--threads")],
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
    problems._add(problem, problems.Variant("PyTorch compile", False, {"step": fail}))
    assert problem.variants == []
    assert problem.notes == ["PyTorch compile does not run here: no compiler"]
    with pytest.raises(RuntimeError, match="no compiler"):
        problems._add(problem, problems.Variant("PyTorch", False, {"step": fail}))


def test_blocks_do_the_same_work():
    block = problems.Block(2, 3, 4, 8)
    conv, pool = nn.Conv2d(block.c, block.k, block.kernel, block.stride, block.padding), nn.MaxPool2d(2)
    x = torch.randn(block.n, block.c, block.h, block.h)
    import dlfast

    ours = dlfast.nn.ConvReLUPool2d.from_modules(conv, pool)
    torch.testing.assert_close(ours(x), problems._Plain(conv, pool)(x))
