"""What is measured: networks and single blocks, each as a list of variants to time; see also optim.py.

A variant of PyTorch is always one of its strongest modes: fused optimizers, channels_last beside the default
format, and torch.compile of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import dlfast
from dlfast.app.settings import TrainConfig, make_optimizer, new_settings
from dlfast.models import NETWORKS, build

Call = Callable[[], object]


@dataclass
class Variant:
    """One way to do the work; each call is timed on its own."""

    name: str
    ours: bool
    calls: dict[str, Call]  # what is timed, by name: "forward", "training step", "step"
    module: nn.Module | None = None  # with `input`: weighed for what it keeps for backward
    input: Tensor | None = None


@dataclass(frozen=True)
class Work:
    """What a call must do: every product once, every input and output moved once."""

    flops: float
    bytes: float


@dataclass
class Problem:
    """The same work in several variants."""

    name: str
    variants: list[Variant]
    notes: list[str] = field(default_factory=list)  # variants that could not run, and why
    moved: dict[str, int] = field(default_factory=dict)  # bytes that a call must read and write, where known
    group: str = ""  # ratios of a group have a mean of their own
    work: dict[str, Work] = field(default_factory=dict)  # of each call, where it is counted
    calls: int = 1  # timed together, where one is too short for the clock

    def variants_by_name(self) -> list[str]:
        return [variant.name for variant in self.variants]


# Modes: (name, channels_last, compiled)
MODES = [("", False, False), (" channels_last", True, False)]
COMPILED = [(" compile", False, True), (" compile channels_last", True, True)]


def networks(names: list[str], batch_size: int | None, compile: bool, device: str) -> Iterator[Problem]:
    """Forward and whole training step of the five networks, with their articles' optimizers."""
    for name in names:
        network = NETWORKS[name]
        # convpool's images are large: its article's batch would need gigabytes in plain PyTorch.
        batch = batch_size or min(network.batch_size, 16 if network.input_size > 128 else 64)
        shape = (batch, network.in_channels, network.input_size, network.input_size)
        images = torch.randn(shape, device=device)
        labels = torch.randint(10, (batch,), device=device)
        problem = Problem(f"{name}, batch {batch}", [])
        for ours in (True, False):
            for mode, channels_last, compiled in MODES + (COMPILED if compile else []):
                if compiled and ours:
                    continue
                model = build(name, fused=ours).to(device)
                # The article's settings, with PyTorch's optimizer in its strongest mode.
                settings = new_settings(TrainConfig(name, backend="fused" if ours else "torch"))
                optimizer = make_optimizer(settings, model.parameters(), fused=None if ours else True)
                for group in optimizer.param_groups:
                    group["lr"] = 1e-9  # the same labels again and again: the article's rate ends in infinities
                label = ("dlfast" if ours else "PyTorch") + mode
                _add_network(problem, label, ours, model, optimizer, images, labels, channels_last, compiled)
        yield problem


def _add_network(
    problem: Problem, label: str, ours: bool, model: dlfast.models.ConvNet, optimizer: torch.optim.Optimizer,
    images: Tensor, labels: Tensor, channels_last: bool, compiled: bool,
) -> None:  # fmt: skip
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    run: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

    def forward() -> None:
        with torch.no_grad():
            run(images)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(run(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    calls: dict[str, Call] = {"forward": forward, "training step": step}
    weighed = None if compiled else model
    add(problem, Variant(label, ours, calls, weighed, images))


def add(problem: Problem, variant: Variant) -> None:
    """Keep `variant` if it runs; torch.compile may lack a compiler here, which must not end the benchmark."""
    try:
        for call in variant.calls.values():
            call()
    except Exception as error:
        if variant.ours or "compile" not in variant.name:
            raise
        problem.notes.append(f"{variant.name} does not run here: {str(error).strip().splitlines()[0]}")
    else:
        problem.variants.append(variant)
