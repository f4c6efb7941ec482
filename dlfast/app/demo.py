"""``dlfast demo``: the same training twice, fused and in plain PyTorch, and what differed.

`mnistnet` on scikit-learn's digits, from the same seed. Prints what was measured, whichever is ahead.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dlfast._native import native
from dlfast.app.files import write_whole
from dlfast.app.measure import alternate, saved_bytes
from dlfast.app.settings import BACKENDS, make_optimizer, new_settings
from dlfast.app.train import Result, TrainConfig, fit
from dlfast.models import NETWORKS, ConvNet, build

NETWORK = "mnistnet"
FIGURE = "comparison.png"
ROUNDS = 100


@dataclass(frozen=True)
class Side:
    """One of the two ways to train, and what it took for a batch."""

    backend: str
    result: Result
    saved_bytes: int  # kept for backward
    step_seconds: list[float]

    @property
    def images_per_second(self) -> float:
        return NETWORKS[NETWORK].batch_size / statistics.median(self.step_seconds)


def compare(epochs: int, seed: int) -> list[Side]:
    """Train with each backend, then weigh and time their steps.

    The times are taken apart from the trainings: those run one after the other, and whatever else the
    machine does meanwhile would decide between them.
    """
    results = []
    for backend in BACKENDS:
        print(f"\n{backend}:", flush=True)
        results.append(fit(TrainConfig(NETWORK, epochs=epochs, seed=seed, backend=backend, device="cpu")))
    print(f"\ntiming {ROUNDS} steps of each, in turn", flush=True)
    models = [build(NETWORK, fused=backend == "fused") for backend in BACKENDS]
    network = NETWORKS[NETWORK]
    images = torch.rand(network.batch_size, network.in_channels, network.input_size, network.input_size)
    labels = torch.randint(10, (network.batch_size,))
    steps = [_step(model, backend, images, labels) for model, backend in zip(models, BACKENDS, strict=True)]
    seconds = alternate(steps, ROUNDS)
    return [
        Side(backend, result, saved_bytes(model, images), times)
        for backend, result, model, times in zip(BACKENDS, results, models, seconds, strict=True)
    ]


def _step(model: ConvNet, backend: str, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = make_optimizer(new_settings(TrainConfig(NETWORK, backend=backend)), model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model.loss(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def speed_ratio(sides: list[Side]) -> tuple[float, float, float]:
    """How many times as fast the first is as the second: median over the rounds, and quartiles.

    >>> from types import SimpleNamespace
    >>> speed_ratio([SimpleNamespace(step_seconds=[1.0] * 5), SimpleNamespace(step_seconds=[2, 1, 2, 3, 2])])
    (2.0, 1.5, 2.5)
    """
    fused, plain = (side.step_seconds for side in sides)
    low, median, high = statistics.quantiles([p / f for f, p in zip(fused, plain, strict=True)], n=4)
    return median, low, high


def difference_in_first_epoch(sides: list[Side]) -> float:
    """The largest between the losses of a step, relative to the larger one.

    Both start from the same weights and see the same batches, so that it tells whether they compute the same. Later
    the losses are near zero and say little: rounding has then led to slightly other weights.

    >>> from types import SimpleNamespace
    >>> curves = [[2.0, 1.0, 0.1, 0.01], [2.0, 1.25, 0.2, 0.05]]
    >>> results = [SimpleNamespace(step_losses=curve, history=["epoch 1", "epoch 2"]) for curve in curves]
    >>> difference_in_first_epoch([SimpleNamespace(result=result) for result in results])
    0.2
    """
    steps = len(sides[0].result.step_losses) // len(sides[0].result.history)
    pairs = zip(*(side.result.step_losses[:steps] for side in sides), strict=True)
    return max((abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs), default=0.0)


def print_table(sides: list[Side]) -> None:
    from rich.console import Console
    from rich.table import Table

    fused, plain = sides
    table = Table(title=f"{NETWORK} on 8x8 digits resized to 28x28, {len(fused.result.history)} epochs, CPU")
    for heading in ("", "fused", "plain PyTorch", "fused / plain"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)

    def row(label: str, a: float, b: float, form: str, ratio: bool = True) -> None:
        table.add_row(label, form.format(a), form.format(b), f"{a / b:.2f}x" if ratio and b else "")

    f, p = fused.result, plain.result
    row("test accuracy", 100 * f.test_accuracy, 100 * p.test_accuracy, "{:.2f} %", ratio=False)
    row("final training loss", f.history[-1].train_loss, p.history[-1].train_loss, "{:.5f}", ratio=False)
    row("images per second", fused.images_per_second, plain.images_per_second, "{:,.0f}")
    row("milliseconds per step", 1e3 * _median(fused), 1e3 * _median(plain), "{:.2f}")
    row("MB saved for backward, one batch", fused.saved_bytes / 1e6, plain.saved_bytes / 1e6, "{:.2f}")
    print()
    Console().print(table)
    speed, low, high = speed_ratio(sides)
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no clear difference"
    print(f"speed of fused over plain, step by step: {speed:.2f}x ({low:.2f} to {high:.2f}), {verdict}")
    difference = difference_in_first_epoch(sides)
    print(f"same training? In the first epoch the losses of a step differ by {100 * difference:.2g} % at most.")
    print("Later rounding adds up and the curves part a little; what matters at the end is the accuracy above.")
    if native.module is None:
        print(f"the fused layers ran as plain PyTorch, since native operators are missing: {native.reason}")


def _median(side: Side) -> float:
    return statistics.median(side.step_seconds)


def figure(sides: list[Side]) -> bytes:
    """The loss curves, the speed and the memory of both, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {"fused": "fused", "torch": "plain PyTorch"}
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    losses, speed, memory = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for side, style in zip(sides, ("-", "--"), strict=True):  # dashed on top: the curves should coincide
        losses.plot(side.result.step_losses, style, label=names[side.backend])
    losses.set(xlabel="step", ylabel="training loss", yscale="log", title="loss of every step")
    losses.legend()
    labels = [names[side.backend] for side in sides]
    colours = ["C0", "C1"]
    bars = speed.bar(labels, [side.images_per_second for side in sides], color=colours)
    speed.bar_label(bars, fmt="{:,.0f}")
    speed.set(title="images per second")
    bars = memory.bar(labels, [side.saved_bytes / 1e6 for side in sides], color=colours)
    memory.bar_label(bars, fmt="{:.1f}")
    memory.set(title="MB saved for backward")
    for axes in (speed, memory):
        axes.margins(y=0.12)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dlfast demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="(default: demo)")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of each training (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")


def run(args: argparse.Namespace) -> int:
    """``dlfast demo`` with parsed options; the exit status."""
    sides = compare(args.epochs, args.seed)
    print_table(sides)
    write_whole(args.out / FIGURE, figure(sides))
    print(f"figure in {args.out / FIGURE}")
    return 0
