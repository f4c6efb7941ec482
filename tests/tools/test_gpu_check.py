"""`make gpu-check` as far as it can be tried without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from dlfast._native import native
from tools.cuda import gpu_check as script

emulated = torch.cuda.is_available() and script.emulated()


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.cuda.gpu_check", *arguments], cwd=script.ROOT, capture_output=True, text=True
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "report.json"
    done = command("--out", str(out))
    assert done.returncode == 2
    why = "sees no CUDA device" if native.build.get("cuda") else "without CUDA"
    assert why in done.stderr or native.module is None
    assert not out.exists()


@pytest.mark.parametrize(
    ("build", "available", "only", "why"),
    [
        ({"cuda": False}, True, ["tests"], "built without CUDA"),
        ({"cuda": True}, False, ["tests"], "no CUDA device"),
        ({"cuda": True}, True, ["tests", "benchmark"], "the emulator"),
        ({"cuda": True}, True, ["tests"], None),
    ],
)
def test_what_is_lacking_is_named(build, available, only, why, monkeypatch):
    monkeypatch.setattr(script, "native", script.native.__class__(sys, "", build))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "CUDA emulator (sm_80)")
    said = script.lacking(only)
    assert (why is None and said is None) or why in said


def test_unknown_stages_are_refused():
    done = command("--only", "everything")
    assert done.returncode == 2
    assert "'everything'" in done.stderr


def test_stages_are_within_ten_minutes_and_take_the_tools_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "sanitizer", lambda: "/opt/compute-sanitizer")
    monkeypatch.setattr(script, "collected", lambda: ["tests/functional/test_conv_cuda.py::test"])
    found = script.stages(list(script.STAGES), None, tmp_path)
    assert [stage.name for stage in found] == ["tests", *script.TOOLS, "benchmark"]
    assert sum(stage.limit for stage in found) < 580
    for stage, tool in zip(found[1:5], script.TOOLS, strict=True):
        assert stage.command[:3] == ["/opt/compute-sanitizer", "--tool", tool]
        assert stage.command[-1] == "tests/functional/test_conv_cuda.py::test"
        assert stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert found[-1].command[-2:] == ["--out", str(tmp_path)]
    (tests,) = script.stages(["tests"], "one and two", tmp_path)
    assert tests.command[tests.command.index("-k") + 1] == "one and two"


def test_the_sample_is_spread_over_the_files_of_kernels():
    names = [f"tests/functional/test_conv_cuda.py::test[{n}]" for n in range(80)]
    names += ["tests/optim/test_small_cuda.py::test", "tests/tools/test_gpu_check.py::test"]
    chosen = script.sample(names)
    assert chosen == [f"tests/functional/test_conv_cuda.py::test[{n}]" for n in range(0, 80, 10)] + [
        "tests/optim/test_small_cuda.py::test"
    ]


@pytest.mark.slow
def test_every_file_of_kernel_tests_is_sampled():
    files = {name.partition("::")[0] for name in script.sample(script.collected())}
    for family in ("relu_pool", "conv", "conv_grad_weight", "grad_bias"):
        assert f"tests/functional/test_{family}_cuda.py" in files
    assert "tests/optim/test_step_cuda.py" in files


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        ("print('4 passed')", "passed", "4 passed"),
        ("print('4 skipped in 1 s')", "failed", "every test was skipped"),
        ("print('1 failed'); raise SystemExit(1)", "failed", "status 1: 1 failed"),
        ("print('== ERROR SUMMARY: 2 errors'); print('1 passed'); raise SystemExit(86)", "failed", "2 errors"),
    ],
)
def test_how_a_stage_ended(code, outcome, reason):
    result = script.run(script.Stage("s", [sys.executable, "-c", code], 60, {}))
    assert (result.outcome, result.name) == (outcome, "s")
    assert reason in result.reason


def test_a_stage_that_takes_too_long_is_ended_with_what_it_started():
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    result = script.run(script.Stage("s", [sys.executable, "-c", code], 2, {}))
    assert time.monotonic() - start < 20
    assert (result.outcome, result.tail) == ("timed out", "begun\n")


def test_a_missing_tool_is_a_stage_that_was_not_run():
    result = script.run(script.Stage("memcheck", ["no-such-sanitizer", "--tool", "memcheck"], 5, {}))
    assert result.outcome == "not run"
    assert "no no-such-sanitizer: install" in result.reason


@pytest.fixture
def pretended(monkeypatch):
    """A GPU in name only."""
    monkeypatch.setattr(script, "lacking", lambda _: None)
    monkeypatch.setattr(script, "device_facts", lambda: {"GPU": "pretended"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Pretended GPU 1")


def test_the_report_is_written_whole(pretended, monkeypatch, tmp_path):
    out = tmp_path / "new" / "report.json"
    (tmp_path / "new").mkdir()
    out.write_text("old")

    def stages(only, select, folder):
        good = f"open({str(folder / 'gpu.json')!r}, 'w').write('{{\"rows\": []}}'); print('ok')"
        return [
            script.Stage("benchmark", [sys.executable, "-c", good], 60, {}),
            script.Stage("tests", [sys.executable, "-c", "raise SystemExit(3)"], 60, {}),
        ]

    monkeypatch.setattr(script, "stages", stages)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(out)])
    assert script.main() == 1
    report = json.loads(out.read_text())
    assert report["device"] == {"GPU": "pretended"}
    assert [(stage["name"], stage["outcome"]) for stage in report["stages"]] == [
        ("benchmark", "passed"), ("tests", "failed"),
    ]  # fmt: skip
    assert report["benchmark"] == {"rows": []}
    assert report["installation"]["torch"] == torch.__version__
    assert [file.name for file in out.parent.iterdir()] == ["report.json"]


def test_an_interrupted_check_leaves_the_old_report(pretended, monkeypatch, tmp_path):
    out = tmp_path / "report.json"
    out.write_text("old")
    monkeypatch.setattr(script, "stages", lambda *_: [script.Stage("s", ["true"], 1, {})])

    def interrupted(stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert out.read_text() == "old"


@pytest.mark.cuda
def test_the_tests_run_from_it(tmp_path):
    """On the emulator, or on a GPU: one test of each of two families."""
    out = tmp_path / "report.json"
    done = command("--only", "tests", "--select", "test_sums_are_rounded_once", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["device"]["GPU"] == torch.cuda.get_device_name(0)
    assert report["stages"][0]["outcome"] == "passed"
    assert "1 passed" in report["stages"][0]["reason"]
