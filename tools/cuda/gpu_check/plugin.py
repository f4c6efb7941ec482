"""pytest plugin: tells about each test as it begins and ends, so that a run that is cut short is not lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tools.cuda.gpu_check import events

REASON = 600  # characters of a failure that are kept
FAULT = 70  # exit status
CRASHED = "???"  # where pytest-xdist reports for a worker that is gone


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    controls = not is_worker and bool(config.getoption("numprocesses", None))
    config.pluginmanager.register(Workers() if controls else Tests())


class Tests:
    """In the process that runs the tests."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        events.begin(nodeid)

    @pytest.hookimpl(trylast=True)  # a worker has handed its report on by then
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            _end(report, "failed")
            if _fault():
                # All that this process still ran would fail with it: another one goes on.
                os._exit(FAULT)
        elif report.skipped:
            _end(report, "skipped")
        elif report.when == "call":
            _end(report, "passed")


class Workers:
    """In the process that has started others to run the tests: it alone learns that one of them is gone."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == CRASHED:
            _end(report, "failed")


def _end(report: pytest.TestReport, outcome: str) -> None:
    events.end(report.nodeid, outcome, report.duration, "" if outcome == "passed" else _reason(report))


def _reason(report: pytest.TestReport) -> str:
    """The message of the error and its line, where pytest tells these apart."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return str(report.longrepr).strip()[-REASON:]
    return f"{crash.message[:REASON]} ({Path(crash.path).name}:{crash.lineno})"


def _fault() -> bool:
    """Whether the CUDA context is broken, as it is after an illegal access."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
