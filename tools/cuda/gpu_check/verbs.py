"""The verbs: what each runs, and how it goes on with what has no result yet."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cuda_build
from tools.cuda.gpu_check.measure import MEASURED
from tools.cuda.gpu_check.process import ROOT, TAIL, Process, last_line, python_path, run
from tools.cuda.gpu_check.results import TIMED_OUT, Progress, Results

# Seconds of each; of sanitize, of each tool, which run side by side.
LIMITS = {
    "tests": 240.0, "sanitize": 240.0, "blocks": 120.0, "networks": 150.0, "steps": 60.0, "graphs": 90.0,
    "compile": 240.0,
}  # fmt: skip
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CHUNK = 400  # tests of one run of pytest
WORKERS = 12  # at most; each has a CUDA context of its own
SANITIZER_FAILED = 86  # so that its findings are told from a script that fails
POLL = 0.5


def go(verb: str, results: Results, limit: float, select: str, again: bool, say: Callable[[str], None]) -> list[str]:
    """Run what `verb` has no result of yet, among the items whose names `select` is found in; the names of all those.

    A failure is said at once, and the rest goes on.

    Raises:
        RuntimeError: the items cannot be listed.
    """
    log = results.path.with_suffix(".log")
    progress = Progress(results, say)
    if again:
        results.forget([name for name in results.items if re.search(select, name)])
    until = time.monotonic() + limit
    names = [name for name in listed(verb, progress, again, limit) if re.search(select, name)]
    try:
        if verb == "sanitize":
            sanitize(results.missing(names), progress, log, until, limit)
        else:
            command = pytest_command if verb == "tests" else measure_command(verb)
            in_turn(names, command, progress, log, until, limit)
    finally:
        progress.results.write()
    return names


def listed(verb: str, progress: Progress, again: bool, limit: float) -> list[str]:
    """The names of all items; those of the tests are kept, because to list them takes long."""
    if verb == "sanitize":
        return list(TOOLS)
    if verb in MEASURED:
        return list(MEASURED[verb]("cuda"))
    results = progress.results
    if again or not results.listed:
        names, broken = collected(limit)
        results.listed = [*names, *broken]
        results.forget([name for name in results.items if name not in results.listed])
        for file, reason in broken.items():
            progress.end(file, "failed", 0.0, reason)
    return results.listed


def in_turn(
    names: Sequence[str], command: Callable[[list[str]], list[str]], progress: Progress, log: Path, until: float,
    limit: float,
) -> None:  # fmt: skip
    """Run `command` of what is missing again and again, until there is nothing left or it is `until`.

    A process that ends too early has failed at the item that it had begun, and another one takes the rest.
    """
    results = progress.results
    reason = f"the limit of {limit:g} s was reached"
    while missing := results.missing(names):
        if time.monotonic() >= until:
            return
        status, output = run(command(missing), log, until, progress.tell)
        if status is None:
            progress.close(TIMED_OUT, reason)
            return
        ended = f"the process ended with status {status}: {last_line(output)}"
        progress.close("failed", ended)
        if len(results.missing(names)) == len(missing):
            # Nothing has run, and would not the next time: what comes after this item is left without a result.
            progress.end(missing[0], "failed", 0.0, ended)
            return


def pytest_command(names: list[str]) -> list[str]:
    workers = min(WORKERS, os.cpu_count() or 1)
    chunk = names[:CHUNK]
    parallel = workers > 1 and len(chunk) > workers and importlib.util.find_spec("xdist") is not None
    return [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.cuda.gpu_check.plugin",
        *(["-n", str(workers)] if parallel else []), *chunk,
    ]  # fmt: skip


def collected(limit: float) -> tuple[list[str], dict[str, str]]:
    """The names of all tests for a GPU, and the files that cannot be read, with the reason."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-rE",
        "--continue-on-collection-errors", "-m", "cuda or gpu_only", "tests",
    ]  # fmt: skip
    environment = {**os.environ, **python_path()}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the tests were not collected within the limit of {limit:g} s") from None
    names, broken = read_collected(done.stdout)
    if not names:
        raise RuntimeError(f"the tests cannot be collected:\n{done.stdout[-TAIL:]}{done.stderr[-TAIL:]}")
    return names, broken


def read_collected(output: str) -> tuple[list[str], dict[str, str]]:
    """
    >>> read_collected("tests/a.py::test[1]\\nERROR tests/b.py - KeyError: 1")
    (['tests/a.py::test[1]'], {'tests/b.py': 'KeyError: 1'})
    """
    broken = dict(re.findall(r"^ERROR (\S+)(?: - (.*))?$", output, re.MULTILINE))
    return [line for line in output.splitlines() if re.match(r"\S+\.py::", line)], broken


def measure_command(verb: str) -> Callable[[list[str]], list[str]]:
    return lambda names: [sys.executable, "-m", "tools.cuda.gpu_check.measure", verb, *names]


def sanitizer() -> str | None:
    """compute-sanitizer from PATH, the toolkit, or the wheel of the extra dev."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [Path(home) / "bin", *(folder / "bin" for folder in cuda_build.wheel_folders())]
    return shutil.which("compute-sanitizer") or next(
        (str(place / "compute-sanitizer") for place in places if (place / "compute-sanitizer").exists()), None
    )


def sanitizer_command(tool: str) -> list[str]:
    return [
        sanitizer() or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FAILED),
        "--launch-timeout", "200", "--target-processes", "application-only", "--kernel-name", "kns=dlfast",
        sys.executable, "-m", "tools.cuda.gpu_check.kernels",
    ]  # fmt: skip


def sanitize(tools: Iterable[str], progress: Progress, log: Path, until: float, limit: float) -> None:
    """All `tools` side by side: most of their time is the host's."""
    # Without torch's pools every tensor is an allocation of its own, whose bounds can be checked.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with contextlib.ExitStack() as stack:
        running = {}
        for tool in tools:
            command = sanitizer_command(tool)
            if shutil.which(command[0]) is None:
                progress.end(tool, "failed", 0.0, f"no {command[0]}: install a CUDA toolkit, or the extra dev")
                continue
            process = Process(command, log.with_name(f"{log.stem}-{tool}.log"), environment)
            running[tool] = stack.enter_context(contextlib.closing(process))
            progress.tell({"begin": tool})
        start = time.monotonic()
        while running and time.monotonic() < until:
            for tool, process in list(running.items()):
                if (status := process.status()) is not None:
                    outcome, reason = sanitized(status, process.output())
                    progress.end(tool, outcome, round(time.monotonic() - start, 3), reason)
                    del running[tool]
            time.sleep(POLL)
        progress.close(TIMED_OUT, f"the limit of {limit:g} s was reached")


def sanitized(status: int, output: str) -> tuple[str, str]:
    """Outcome and reason of a tool that has ended by itself."""
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    last = summary[-1] if summary else last_line(output)
    if status == 0 and not summary:
        return "failed", f"the tool gave no summary: {last}"
    if status in (0, SANITIZER_FAILED):
        return ("failed" if status else "passed"), last
    return "failed", f"status {status}: {last_line(output)}"
