"""How it is measured: variants in turn, medians and quartiles, ratios round by round."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import dlfast.info
from dlfast.app.bench.problems import Problem, Variant, Work
from dlfast.app.measure import alternate, peak_bytes, saved_bytes


@dataclass(frozen=True)
class Row:
    """One variant of one problem: seconds are quartiles over the rounds, bytes are of one call."""

    problem: str
    quantity: str
    variant: str
    ours: bool
    seconds: float
    low: float
    high: float
    saved_bytes: int | None  # kept for backward beyond input and parameters; None: not weighed
    peak_bytes: int | None  # allocated at once beyond what was there before


@dataclass(frozen=True)
class Ratio:
    """The fastest variant of PyTorch over the fastest of dlfast, round by round; above 1 we are faster."""

    problem: str
    quantity: str
    ours: str
    theirs: str
    median: float
    low: float
    high: float
    group: str = ""
    of_roofline: float | None = None  # what the roofline gives for the dense formulas, over our seconds


@dataclass(frozen=True)
class Point:
    """A call of a problem under the roofline: work as the dense formulas have it, seconds of the fastest modes."""

    problem: str
    quantity: str
    flops: float
    bytes: float
    ours: float
    theirs: float


@dataclass(frozen=True)
class Roofline:
    """What the machine reaches: multiplications and additions, and bytes read and written, per second."""

    flops: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


@dataclass(frozen=True)
class Report:
    """Everything one run has measured, with the machine it was measured on."""

    machine: dict[str, str]
    rows: list[Row]
    ratios: list[Ratio]
    notes: list[str]
    points: list[Point] = field(default_factory=list)
    roofline: Roofline | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_average() -> str:
    """Of the last minute: what else the machine was doing."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def machine() -> dict[str, str]:
    """The facts of ``dlfast info`` that a figure depends on, and the load before the run."""
    facts = dlfast.info.facts()
    kept = (
        "dlfast",
        "python",
        "torch",
        "CPU",
        "threads",
        "GPU",
        "SIMD level",
        "PyTorch's SIMD level",
    )
    return {**{key: facts[key] for key in kept}, "load average before": load_average()}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile.

    >>> quartiles([3.0, 1.0, 2.0, 5.0, 4.0])
    (3.0, 1.5, 4.5)
    """
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def measure(problem: Problem, rounds: int) -> tuple[list[Row], list[Ratio]]:
    """Time and weigh every variant of `problem`."""
    rows, ratios = [], []
    quantities = list(problem.variants[0].calls)
    for quantity in quantities:
        seconds = alternate([variant.calls[quantity] for variant in problem.variants], rounds, calls=problem.calls)
        for variant, times in zip(problem.variants, seconds, strict=True):
            rows.append(_row(problem, quantity, variant, times))
        ratios.append(_ratio(problem, quantity, dict(zip(problem.variants_by_name(), seconds, strict=True))))
    return rows, ratios


def _row(problem: Problem, quantity: str, variant: Variant, times: list[float]) -> Row:
    median, low, high = quartiles(times)
    trains = quantity in ("training step", "forward + backward")
    saved = None
    if trains and variant.module is not None and variant.input is not None:
        saved = saved_bytes(variant.module, variant.input)
    peak = peak_bytes(variant.calls[quantity]) if trains else None
    return Row(problem.name, quantity, variant.name, variant.ours, median, low, high, saved, peak)


def _ratio(problem: Problem, quantity: str, seconds: dict[str, list[float]]) -> Ratio:
    def fastest(ours: bool) -> str:
        names = [variant.name for variant in problem.variants if variant.ours is ours]
        return min(names, key=lambda name: statistics.median(seconds[name]))

    ours, theirs = fastest(True), fastest(False)
    median, low, high = quartiles([t / o for o, t in zip(seconds[ours], seconds[theirs], strict=True)])
    return Ratio(problem.name, quantity, ours, theirs, median, low, high, problem.group)


def under_roofline(
    problem: Problem, rows: list[Row], ratios: list[Ratio], roofline: Roofline
) -> tuple[list[Ratio], list[Point]]:
    """The ratios of `problem` with their part of the roofline, and its points."""
    placed, points = [], []
    for ratio in ratios:
        seconds = {row.variant: row.seconds for row in rows if row.quantity == ratio.quantity}
        work = problem.work[ratio.quantity]
        ours, theirs = seconds[ratio.ours], seconds[ratio.theirs]
        placed.append(replace(ratio, of_roofline=roofline.seconds(work) / ours))
        points.append(Point(problem.name, ratio.quantity, work.flops, work.bytes, ours, theirs))
    return placed, points


def bandwidths(problem: Problem, rows: list[Row], copy: float) -> list[str]:
    """What each side achieves of the machine's bandwidth, counting only the bytes that must be moved.

    `copy` is the bandwidth of copying, in bytes read and written per second. More than all of it means that
    caches held a part.
    """
    notes = []
    for quantity, moved in problem.moved.items():
        for ours in (True, False):
            row = min((r for r in rows if r.quantity == quantity and r.ours is ours), key=lambda r: r.seconds)
            achieved = moved / row.seconds
            notes.append(
                f"{problem.name}, {quantity}: {row.variant} moves {achieved / 1e9:.1f} GB/s of what it must, "
                f"{achieved / copy:.0%} of the {copy / 1e9:.1f} GB/s of a copy"
            )
    return notes


def geometric_mean(ratios: list[Ratio]) -> float:
    """Of the medians."""
    return statistics.geometric_mean(ratio.median for ratio in ratios)


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
