"""python -m tools.cuda.gpu_check.measure VERB ITEM...: measures these, one after the other, and tells of each.

Times are those of `dlfast.app.bench`: variants in turn, medians and quartiles. Where kernels alone are wanted, calls
are captured in a CUDA graph, and replays of it are timed.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch

from dlfast.app.bench import protocol
from dlfast.app.bench.problems import Call
from tools.cuda.gpu_check import blocks, events, steps, training
from tools.cuda.gpu_check.trial import Makers, Trial, summary, use_tf32

MEASURED: dict[str, Callable[[str], Makers]] = {
    "blocks": blocks.makers,
    "networks": training.network_makers,
    "steps": steps.makers,
    "graphs": training.graph_makers,
    "compile": training.compile_makers,
}
ROUNDS = 10
WARMUP = 3
# What a step allocates there was allocated before.
HOLD_MEMORY = ("graphed", "reduce-overhead")


def main(verb: str, names: Iterable[str]) -> int:
    """1 if an item failed. The rest is then for another process: what a kernel has broken stays broken in this one."""
    prepare()
    makers = MEASURED[verb]("cuda")
    for name in names:
        events.begin(name)
        start = time.monotonic()
        failures, measured = attempt(makers[name], ROUNDS)
        outcome = "failed" if failures else "passed"
        events.end(name, outcome, time.monotonic() - start, "; ".join(failures), problems=measured)
        if failures:
            return 1
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return 0


def prepare() -> None:
    """PyTorch at its best, and nothing that another process has timed."""
    os.environ["DLFAST_CACHE_DIR"] = ""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    use_tf32(True)


def attempt(make: Callable[[], Iterable[Trial]], rounds: int) -> tuple[list[str], list[dict[str, Any]]]:
    """What failed, and what was measured of each problem all the same."""
    failures: list[str] = []
    measured: list[dict[str, Any]] = []
    try:
        for trial in make():
            measured.append(measure(trial, rounds))
            failures += trial.failures
    except Exception as error:
        traceback.print_exc()
        failures.append(summary(error))
    return failures, measured


def measure(trial: Trial, rounds: int) -> dict[str, Any]:
    """Rows and ratios of `trial`; no ratio where all variants of a side have failed."""
    divide = trial.captured or 1
    if trial.captured:
        capture_all(trial)
    sides = {variant.ours for variant in trial.variants}
    if len(sides) < 2:
        trial.failures.append(f"{trial.name}: no variant of {'PyTorch' if True in sides else 'dlfast'} runs")
        return {"name": trial.name, "rows": [], "ratios": [], "notes": trial.notes}
    rows, ratios = protocol.measure(trial, rounds)
    for index, row in enumerate(rows):
        seconds = {name: getattr(row, name) / divide for name in ("seconds", "low", "high")}
        held = divide > 1 or any(word in row.variant for word in HOLD_MEMORY)
        rows[index] = replace(row, **seconds, peak_bytes=None if held else row.peak_bytes)
    return {
        "name": trial.name,
        "rows": [asdict(row) for row in rows],
        "ratios": [asdict(ratio) for ratio in ratios],
        "notes": trial.notes,
    }


def capture_all(trial: Trial) -> None:
    """Replace every call by the replay of a graph of `trial.captured` calls; variants that fail are left out."""
    for variant in list(trial.variants):
        try:
            variant.calls = {quantity: captured(call, trial.captured) for quantity, call in variant.calls.items()}
        except Exception as error:
            trial.failures.append(f"{trial.name}, {variant.name}: cannot be captured: {summary(error)}")
            trial.variants.remove(variant)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all captures, so that what autograd keeps for a stream fits all of them."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def captured(call: Call, count: int) -> Call:
    """A replay of `count` calls. It keeps `call`, and so the tensors that the graph reads and writes."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            call()

    def replay(_kept: Call = call) -> None:
        graph.replay()

    return replay


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
