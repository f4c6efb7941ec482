"""All results of a folder as one page for people: report.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dlfast.app.files import write_whole
from tools.cuda.gpu_check.results import ENDED, TIMED_OUT, Results

SHOWN = 50  # failures of a verb


def write(folder: Path, facts: Mapping[str, str], verbs: Mapping[str, Results]) -> Path:
    """Write report.md of what `verbs` have found, the facts first; its path."""
    path = folder / "report.md"
    lines = ["# What a GPU said", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    for verb, results in verbs.items():
        lines += ["", f"## {verb}", "", *_of_verb(results)]
    write_whole(path, ("\n".join(lines) + "\n").encode())
    return path


def counted(outcomes: Iterable[str]) -> str:
    """
    >>> counted(["passed", "failed", "passed"])
    '2 passed, 1 failed'
    """
    counts = Counter(outcomes)
    return ", ".join(f"{counts[name]} {name}" for name in (*ENDED, TIMED_OUT) if counts[name]) or "nothing has run"


def _of_verb(results: Results) -> list[str]:
    entries = results.items
    lines = [counted(entry["outcome"] for entry in entries.values()) + "."]
    failed = [(name, entry) for name, entry in entries.items() if entry["outcome"] in ("failed", TIMED_OUT)]
    if failed:
        lines += [""] + [f"- {entry['outcome']}: {name}: {_cell(entry['reason'])}" for name, entry in failed[:SHOWN]]
        lines += [f"- and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
    problems = [problem for entry in entries.values() for problem in entry.get("problems", [])]
    if problems:
        lines += ["", "| problem | quantity | variant | ms: median (quartiles) | peak MB | ratio (quartiles) |"]
        lines += ["|---|---|---|---|---|---|"]
        for problem in problems:
            lines += _rows(problem)
        notes = [f"- {problem['name']}: {_cell(note)}" for problem in problems for note in problem["notes"]]
        lines += ["", *notes] if notes else []
    return lines


def _rows(problem: Mapping[str, Any]) -> list[str]:
    """Its variants; the ratio stands beside the fastest of ours."""
    ratios = {(ratio["quantity"], ratio["ours"]): ratio for ratio in problem["ratios"]}
    lines = []
    for row in problem["rows"]:
        milliseconds = " ".join(f"{1e3 * row[name]:.4g}" for name in ("seconds", "low", "high"))
        median, low, high = milliseconds.split()
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
        ratio = ratios.get((row["quantity"], row["variant"]))
        beside = "" if ratio is None else (
            f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}) of {ratio['theirs']}"
        )  # fmt: skip
        time = f"{median} ({low} to {high})"
        lines.append(f"| {problem['name']} | {row['quantity']} | {row['variant']} | {time} | {peak} | {beside} |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:400]
