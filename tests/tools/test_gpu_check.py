"""`make gpu-check` as far as it can be tried without a GPU: what is run, kept, left out and said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from dlfast._native import native
from tools.cuda.gpu_check import __main__ as script
from tools.cuda.gpu_check import device, measure, process, results, verbs

KEY = results.Key("chip", "driver", "torch", "commit")
# Ends each item as its name says.
ITEMS = """
import os, sys, time
sys.path.insert(0, {root!r})
from tools.cuda.gpu_check import events
for name in sys.argv[1:]:
    with open({runs!r}, "a") as file:
        file.write(name + "\\n")
    events.begin(name)
    if "crash" in name:
        print("a fault of the GPU", flush=True)
        os._exit(7)
    if "hang" in name:
        time.sleep(60)
    events.end(name, "failed" if "bad" in name else "passed", 0.5, "is bad" if "bad" in name else "", problems=[])
"""


@pytest.fixture
def items(tmp_path):
    """A command that runs items, and a function that tells which have begun."""
    program, runs = tmp_path / "items.py", tmp_path / "runs"
    program.write_text(ITEMS.format(root=str(process.ROOT), runs=str(runs)))

    def run():
        found = runs.read_text().splitlines() if runs.exists() else []
        runs.unlink(missing_ok=True)
        return found

    return (lambda names: [sys.executable, str(program), *names]), run


def outcomes(found):
    return {name: entry["outcome"] for name, entry in found.items.items()}


def in_turn(names, command, path, limit=60.0):
    said = []
    found = results.Results(path, KEY)
    verbs.in_turn(
        names, command, results.Progress(found, said.append), path.with_suffix(".log"), time.monotonic() + limit, limit
    )
    return results.Results(path, KEY), said


def test_what_fails_or_crashes_is_said_and_the_rest_goes_on(items, tmp_path):
    command, run = items
    names = ["one", "bad", "crash", "two"]
    found, said = in_turn(names, command, tmp_path / "verb.json")
    assert outcomes(found) == {"one": "passed", "bad": "failed", "crash": "failed", "two": "passed"}
    assert said == ["failed: bad: is bad", "failed: crash: the process ended with status 7: a fault of the GPU"]
    assert run() == names
    assert found.items["one"]["problems"] == []


def test_what_has_a_result_is_not_run_again(items, tmp_path):
    command, run = items
    in_turn(["one", "bad"], command, tmp_path / "verb.json")
    run()
    found, said = in_turn(["one", "bad", "two"], command, tmp_path / "verb.json")
    assert run() == ["two"]
    assert said == []
    assert outcomes(found) == {"one": "passed", "bad": "failed", "two": "passed"}


def test_what_ran_out_of_time_is_tried_again_after_the_rest(items, tmp_path):
    command, run = items
    start = time.monotonic()
    found, said = in_turn(["one", "hang", "two"], command, tmp_path / "verb.json", limit=4.0)
    assert time.monotonic() - start < 30
    assert outcomes(found) == {"one": "passed", "hang": "timed out"}
    assert said == ["timed out: hang: the limit of 4 s was reached"]
    assert found.missing(["one", "hang", "two"]) == ["two", "hang"]
    run()
    found, _ = in_turn(["one", "hang", "two"], command, tmp_path / "verb.json", limit=4.0)
    assert run() == ["two", "hang"]
    assert outcomes(found) == {"one": "passed", "hang": "timed out", "two": "passed"}


def test_a_process_that_runs_nothing_is_not_started_for_ever(tmp_path):
    found, said = in_turn(
        ["one", "two"], lambda _: [sys.executable, "-c", "raise SystemExit('no torch')"], tmp_path / "v.json"
    )
    assert outcomes(found) == {"one": "failed"}
    assert said == ["failed: one: the process ended with status 1: no torch"]


def test_a_process_ends_with_what_it_has_started(tmp_path):
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    status, output = process.run([sys.executable, "-c", code], tmp_path / "log", start + 2, print)
    assert time.monotonic() - start < 20
    assert (status, output) == (None, "begun\n")


def test_what_is_on_the_path_stays_there_after_this_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code = "import os; print(os.environ['PYTHONPATH'])"
    _, output = process.run([sys.executable, "-c", code], tmp_path / "log", time.monotonic() + 60, print)
    assert output.strip() == f"{process.ROOT}{os.pathsep}/elsewhere"


def test_lines_are_read_when_they_are_whole(tmp_path):
    running = process.Process(["true"], tmp_path / "log")
    with running._events.open("ab", buffering=0) as file:
        file.write(b'{"begin": "one"}\n{"beg')
        assert running.new_events() == [{"begin": "one"}]
        file.write(b'in": "two"}\n')
        assert running.new_events() == [{"begin": "two"}]
    assert running.new_events() == []
    running.close()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"key": {}, "items": {}}', "is damaged"),
        ('{"key": {}, "items": {"one": {"outcome": "nearly"}}, "listed": []}', "unknown outcome 'nearly'"),
        ('{"key": {}, "items": {"one": {"outcome": "passed"}}, "listed": []}', "is damaged"),
        ('{"key": {"commit": "other"}, "items": {}, "listed": []}', "commit other"),
    ],
)
def test_a_file_that_is_damaged_or_of_another_key_is_ignored(content, why, tmp_path, items):
    path = tmp_path / "verb.json"
    path.write_text(content)
    found = results.Results(path, KEY)
    assert why in found.ignored
    assert found.items == {}
    command, _ = items
    found, _ = in_turn(["one"], command, path)
    assert found.ignored == ""
    assert outcomes(found) == {"one": "passed"}


def test_bytes_that_are_no_text_are_ignored(tmp_path):
    path = tmp_path / "verb.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is damaged" in results.Results(path, KEY).ignored


def test_a_write_that_fails_leaves_the_results_of_before(items, tmp_path, monkeypatch):
    command, _ = items
    path = tmp_path / "verb.json"
    in_turn(["one"], command, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        in_turn(["one", "bad"], command, path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".verb.json*"))


def test_the_first_failure_of_an_item_stays(tmp_path):
    found = results.Results(tmp_path / "verb.json", KEY)
    progress = results.Progress(found, lambda _: None)
    progress.end("test", "failed", 1.0, "an illegal access")
    progress.end("test", "failed", 1.0, "its worker is gone")
    assert found.items["test"]["reason"] == "an illegal access"
    progress.end("other", "passed", 1.0, "")
    progress.end("other", "failed", 1.0, "in teardown")
    assert outcomes(found) == {"test": "failed", "other": "failed"}


@pytest.fixture
def pretended(monkeypatch, items):
    """A GPU in name only, whose networks are the items of a program."""
    command, run = items
    names = ["one", "two bad", "three"]
    monkeypatch.setattr(device, "lacking", lambda _: None)
    monkeypatch.setattr(device, "facts", lambda: {"GPU": "pretended", "driver_version": "1"})
    monkeypatch.setattr(device, "commit", lambda _: "0123")
    monkeypatch.setattr(verbs, "MEASURED", {**measure.MEASURED, "networks": lambda _: dict.fromkeys(names)})
    monkeypatch.setattr(verbs, "measure_command", lambda _: command)
    return run


def test_a_second_run_goes_on_and_again_begins_anew(pretended, tmp_path, capsys):
    out = tmp_path / "gpu"
    arguments = ["networks", "--out", str(out)]
    assert script.main([*arguments, "--select", "^one$"]) == 0
    assert pretended() == ["one"]
    assert script.main(arguments) == 1
    assert pretended() == ["two bad", "three"]
    said = capsys.readouterr().out
    assert "failed: two bad: is bad" in said
    assert "networks: 2 passed, 1 failed" in said
    assert script.main(arguments) == 1
    assert pretended() == []
    assert script.main([*arguments, "--select", "one", "--again"]) == 0
    assert pretended() == ["one"]
    content = json.loads((out / "networks.json").read_text())
    assert content["key"] == {"chip": "pretended", "driver": "1", "torch": torch.__version__, "commit": "0123"}
    assert set(content["items"]) == {"one", "two bad", "three"}
    page = (out / "report.md").read_text()
    assert "| GPU | pretended |" in page
    assert "- failed: two bad: is bad" in page
    assert not list(out.glob(".*"))


def test_another_commit_has_no_results_yet(pretended, tmp_path, monkeypatch, capsys):
    arguments = ["networks", "--select", "one", "--out", str(tmp_path / "gpu")]
    assert script.main(arguments) == 0
    assert pretended() == ["one"]
    monkeypatch.setattr(device, "commit", lambda _: "4567")
    assert script.main(arguments) == 0
    assert pretended() == ["one"]
    assert "networks.json is of commit 0123" in capsys.readouterr().out


def test_a_verb_that_cannot_begin_fails_and_the_next_one_runs(pretended, tmp_path, monkeypatch, capsys):
    def broken(_):
        raise RuntimeError("the tests cannot be collected")

    monkeypatch.setattr(verbs, "collected", broken)
    assert script.main(["tests", "networks", "--select", "one", "--out", str(tmp_path)]) == 1
    assert pretended() == ["one"]
    assert "tests: the tests cannot be collected" in capsys.readouterr().out


@pytest.mark.parametrize("select", ["nothing is called this", "one"])
def test_nothing_selected_or_run_is_no_success(select, pretended, tmp_path, monkeypatch):
    monkeypatch.setattr(verbs, "LIMITS", {**verbs.LIMITS, "networks": 1e-9})
    assert script.main(["networks", "--select", select, "--out", str(tmp_path)]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "gpu"
    command = [sys.executable, "-m", "tools.cuda.gpu_check", "--out", str(out)]
    done = subprocess.run(command, cwd=process.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    why = "sees no CUDA device" if native.build.get("cuda") else "without CUDA"
    assert why in done.stderr or native.module is None
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["everything"], "'everything'"),
        (["--limit", "tests"], "SECONDS must be a positive number, got 'tests'"),
        (["--limit", "tests=-1"], "SECONDS must be a positive number, got 'tests=-1'"),
        (["--limit", "all=5"], "must be VERB=SECONDS with a VERB of tests, sanitize"),
        (["--select", "("], "must be a regular expression, got '('"),
    ],
)
def test_bad_options_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_limits_are_those_of_each_verb():
    args = script.parsed(["tests", "--limit", "tests=60", "--limit", "blocks=7"])
    assert script.limits(args) == {**verbs.LIMITS, "tests": 60.0, "blocks": 7.0}


TOOL = """
import sys, time
print("=== ", *sys.argv[1:])
if sys.argv[2] == "memcheck":
    print("========= ERROR SUMMARY: 0 errors")
elif sys.argv[2] == "racecheck":
    print("========= RACECHECK SUMMARY: 3 hazards displayed")
    raise SystemExit(86)
elif sys.argv[2] == "synccheck":
    print("the driver is too old")
    raise SystemExit(1)
else:
    time.sleep(60)
"""


def test_tools_run_side_by_side_each_within_its_time(tmp_path, monkeypatch):
    program = tmp_path / "sanitizer.py"
    program.write_text(TOOL)
    made = verbs.sanitizer_command
    monkeypatch.setattr(verbs, "sanitizer_command", lambda tool: [sys.executable, str(program), *made(tool)[1:]])
    said = []
    found = results.Results(tmp_path / "sanitize.json", KEY)
    verbs.go("sanitize", found, 8.0, "", False, said.append)
    assert outcomes(found) == {
        "memcheck": "passed", "racecheck": "failed", "synccheck": "failed", "initcheck": "timed out",
    }  # fmt: skip
    assert found.items["racecheck"]["reason"] == "========= RACECHECK SUMMARY: 3 hazards displayed"
    assert found.items["synccheck"]["reason"] == "status 1: the driver is too old"
    assert "--tool racecheck" in (tmp_path / "sanitize-racecheck.log").read_text()
    assert "failed: racecheck: ========= RACECHECK SUMMARY: 3 hazards displayed" in said
    assert verbs.sanitized(0, "nothing was said")[0] == "failed"


def test_a_missing_sanitizer_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(verbs, "sanitizer", lambda: "no-such-sanitizer")
    found = results.Results(tmp_path / "sanitize.json", KEY)
    verbs.go("sanitize", found, 5.0, "memcheck", False, lambda _: None)
    assert outcomes(found) == {"memcheck": "failed"}
    assert "no no-such-sanitizer: install" in found.items["memcheck"]["reason"]


TESTS = """
import os, time
import pytest
from tools.cuda.gpu_check import plugin
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
@pytest.fixture
def broken():
    yield
    raise ValueError("in teardown")
def test_teardown(broken): pass
def test_exits(): os._exit(3)
def test_faults():
    plugin._fault = lambda: True
    raise RuntimeError("an illegal access")
def test_last(): assert plugin._fault.__name__ == "_fault"
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_each_test_is_recorded_as_it_ends(workers, tmp_path, monkeypatch):
    """Also one that ends its process, or breaks what the process has of the GPU: the others run in the next one."""
    file = tmp_path / "test_some.py"
    file.write_text(textwrap.dedent(TESTS))
    (tmp_path / "pytest.ini").write_text("[pytest]")
    tests = ["good", "bad", "skipped", "teardown", "exits", "faults", "last"]
    names = [f"test_some.py::test_{name}" for name in tests]
    made = verbs.pytest_command

    def command(chunk):
        assert "tools.cuda.gpu_check.plugin" in made(chunk)
        short = [word for word in made(chunk) if word not in chunk]
        return [*short, *workers, "--rootdir", str(tmp_path), *[str(tmp_path / name) for name in chunk]]

    monkeypatch.setattr(verbs, "WORKERS", 1)
    found, said = in_turn(names, command, tmp_path / "tests.json")
    assert [outcomes(found)[name] for name in names] == [
        "passed",
        "failed",
        "skipped",
        "failed",
        "failed",
        "failed",
        "passed",
    ]
    assert found.items[names[1]]["reason"] == "assert 1 == 2 (test_some.py:6)"
    assert found.items[names[3]]["reason"].startswith("ValueError: in teardown (test_some.py:")
    assert found.items[names[5]]["reason"].startswith("RuntimeError: an illegal access")
    assert any(line.startswith("failed: test_some.py::test_exits: ") for line in said)


def test_pytest_runs_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(verbs, "CHUNK", 2)
    command = verbs.pytest_command(["a.py::x", "a.py::y", "a.py::z"])
    assert command[-2:] == ["a.py::x", "a.py::y"]


def test_a_file_that_cannot_be_collected_is_a_failure_and_the_rest_runs(tmp_path, monkeypatch, items):
    command, run = items
    broken = {"tests/b.py": "No module named 'hypothesis'"}
    monkeypatch.setattr(verbs, "collected", lambda _: (["tests/a.py::one", "tests/a.py::two"], broken))
    monkeypatch.setattr(verbs, "pytest_command", command)
    path, said = tmp_path / "tests.json", []
    names = verbs.go("tests", results.Results(path, KEY), 30.0, "", False, said.append)
    assert names == ["tests/a.py::one", "tests/a.py::two", "tests/b.py"]
    assert said == ["failed: tests/b.py: No module named 'hypothesis'"]
    assert run() == names[:2]
    monkeypatch.setattr(verbs, "collected", None)  # not called: the names are kept
    verbs.go("tests", results.Results(path, KEY), 30.0, "", False, said.append)
    assert run() == []
    monkeypatch.setattr(verbs, "collected", lambda _: (["tests/a.py::one", "tests/b.py::three"], {}))
    verbs.go("tests", results.Results(path, KEY), 30.0, "b.py", True, said.append)
    assert run() == ["tests/b.py::three"]
    assert outcomes(results.Results(path, KEY)) == {"tests/a.py::one": "passed", "tests/b.py::three": "passed"}


def test_collecting_is_within_the_limit():
    with pytest.raises(RuntimeError, match=r"not collected within the limit of 0.01 s"):
        verbs.collected(0.01)


@pytest.mark.slow
def test_every_file_of_kernel_tests_is_collected():
    names, broken = verbs.collected(300.0)
    assert broken == {}
    files = {name.partition("::")[0] for name in names}
    for family in ("relu_pool", "conv", "conv_grad_weight", "grad_bias"):
        assert f"tests/functional/test_{family}_cuda.py" in files
    assert "tests/optim/test_step_cuda.py" in files


@pytest.mark.cuda
def test_the_tests_run_from_it(tmp_path):
    """On the emulator, or on a GPU."""
    command = [
        sys.executable, "-m", "tools.cuda.gpu_check", "tests", "--select", "test_sums_are_rounded_once",
        "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=process.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "tests.json").read_text())
    assert content["key"]["chip"] == torch.cuda.get_device_name(0)
    assert [entry["outcome"] for entry in content["items"].values()] == ["passed"]
