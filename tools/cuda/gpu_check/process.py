"""Runs a command within a time, and hands on what it tells while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.cuda.gpu_check import events

ROOT = Path(__file__).resolve().parents[3]
POLL = 0.2  # seconds
TAIL = 4000

Event = dict[str, Any]


class Process:
    """A command in a session of its own, so that what it has started ends with it; its output goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._events = Path(self._folder.name) / "events"
        self._events.touch()
        self._read = 0
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {**python_path(), "PYTHONUNBUFFERED": "1", events.FILE: str(self._events)}
        with log.open("ab") as output:
            self._before = output.tell()
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **own, **(environment or {})},
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def status(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def new_events(self) -> list[Event]:
        """Those that have been written whole since the last call."""
        with self._events.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]

    def output(self) -> str:
        """What it has printed last."""
        with self._log.open("rb") as file:
            file.seek(max(self._before, self._log.stat().st_size - TAIL))
            return file.read().decode(errors="replace")

    def stop(self) -> None:
        """End it, if it still runs, and what it has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()


def python_path() -> dict[str, str]:
    """PYTHONPATH with this repository before what it holds already."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run(
    command: Sequence[str], log: Path, until: float, tell: Callable[[Event], None],
    environment: Mapping[str, str] | None = None,
) -> tuple[int | None, str]:  # fmt: skip
    """Exit status and last output of `command`, or None for one that was ended at `until` (of `time.monotonic`)."""
    with contextlib.closing(Process(command, log, environment)) as process:
        while True:
            status = process.status()
            for event in process.new_events():
                tell(event)
            if status is not None:
                return status, process.output()
            if time.monotonic() >= until:
                process.stop()
                for event in process.new_events():
                    tell(event)
                return None, process.output()
            time.sleep(POLL)


def last_line(output: str) -> str:
    """
    >>> last_line("one\\ntwo\\n\\n")
    'two'
    """
    lines = output.strip().splitlines()
    return lines[-1] if lines else "no output"
