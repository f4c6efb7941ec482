"""What a verb has found so far, in one file that is written whole after every change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dlfast.app.files import write_whole

ENDED = ("passed", "failed", "skipped")
TIMED_OUT = "timed out"  # will be tried again
SAID = 300  # characters of a reason
SECONDS_BETWEEN = 1.0  # two writes, but after a failure


@dataclass(frozen=True)
class Key:
    """What results depend on: those of another one are not counted."""

    chip: str
    driver: str
    torch: str
    commit: str


class Results:
    """The items of one verb, by name, each with its outcome, seconds, reason, and what was measured.

    Anything in `path` that is damaged, or of another key, is ignored and written over at the first result.
    """

    def __init__(self, path: Path, key: Key) -> None:
        self.path = path
        self.items: dict[str, dict[str, Any]] = {}
        self.listed: list[str] = []
        """The names of all items of the verb, where listing them takes long."""
        self.ignored = ""
        self._key = vars(key)
        self._written = 0.0
        if path.exists():
            self._load()

    def _load(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            key, items, listed = content["key"], content["items"], content["listed"]
            if not all(isinstance(name, str) for name in listed):
                raise ValueError("a name is no text")
            for entry in items.values():
                if entry["outcome"] not in (*ENDED, TIMED_OUT):
                    raise ValueError(f"unknown outcome {entry['outcome']!r}")
                if not isinstance(entry["reason"], str) or not isinstance(entry["seconds"], (int, float)):
                    raise ValueError("a result lacks its reason or its seconds")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.ignored = f"{self.path} is damaged ({type(error).__name__}: {error})"
            return
        if key != self._key:
            other = [f"{name} {key.get(name)}" for name, value in self._key.items() if key.get(name) != value]
            self.ignored = f"{self.path} is of {', '.join(other)}"
            return
        self.items, self.listed = items, listed

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those without a result, what ran out of time last, so that it does not keep the others from running."""
        left = [name for name in names if not self.has(name)]
        return sorted(left, key=lambda name: name in self.items)

    def has(self, name: str) -> bool:
        return name in self.items and self.items[name]["outcome"] in ENDED

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.items.pop(name, None)

    def record(self, name: str, outcome: str, seconds: float, reason: str, **more: Any) -> None:
        self.items[name] = {"outcome": outcome, "seconds": seconds, "reason": reason, **more}
        if outcome == "failed" or time.monotonic() - self._written > SECONDS_BETWEEN:
            self.write()

    def write(self) -> None:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = {"key": self._key, "written": when, "listed": self.listed, "items": self.items}
        write_whole(self.path, (json.dumps(content, indent=1) + "\n").encode())
        self._written = time.monotonic()


class Progress:
    """Records what the processes of a verb tell, and says at once what failed."""

    def __init__(self, results: Results, say: Callable[[str], None]) -> None:
        self.results = results
        self._say = say
        self._begun: dict[str, float] = {}

    def tell(self, event: dict[str, Any]) -> None:
        """An event of `events`."""
        if "begin" in event:
            self._begun[event["begin"]] = time.monotonic()
        else:
            more = {name: value for name, value in event.items() if name != "end"}
            self.end(event["end"], **more)

    def end(self, name: str, outcome: str, seconds: float, reason: str, **more: Any) -> None:
        self._begun.pop(name, None)
        if self.results.items.get(name, {}).get("outcome") == "failed":
            return  # what failed first says most
        self.results.record(name, outcome, seconds, reason, **more)
        if outcome in ("failed", TIMED_OUT):
            self._say(f"{outcome}: {name}: {' '.join(reason.split())[:SAID]}")

    def close(self, outcome: str, reason: str) -> None:
        """What has begun will not end."""
        for name, start in list(self._begun.items()):
            self.end(name, outcome, round(time.monotonic() - start, 3), reason)
        self.results.write()
