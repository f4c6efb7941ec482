"""What the processes of a verb tell it: lines of JSON, appended to a file that the environment names.

`begin` and `end` are for whoever runs items; several processes may write to the same file, each line at once.
"""

from __future__ import annotations

import json
import os
from typing import Any

FILE = "DLFAST_GPU_CHECK_EVENTS"


def begin(item: str) -> None:
    """`item` has begun; if it never ends, it is to blame."""
    _send({"begin": item})


def end(item: str, outcome: str, seconds: float, reason: str, **more: Any) -> None:
    """How `item` ended: "passed", "failed" or "skipped", why, and what it found. A second line replaces the first."""
    _send({"end": item, "outcome": outcome, "seconds": round(seconds, 3), "reason": reason, **more})


def _send(event: dict[str, Any]) -> None:
    with open(os.environ[FILE], "ab", buffering=0) as file:
        file.write((json.dumps(event) + "\n").encode())
