"""What is measured: networks and single blocks, each as a list of variants to time; see also optim.py.

A variant of PyTorch is always one of its strongest modes: fused optimizers, channels_last beside the default
format, and torch.compile of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlfast
from dlfast.models import NETWORKS, build
from dlfast.settings import TrainConfig, make_optimizer, new_settings

Call = Callable[[], object]


@dataclass
class Variant:
    """One way to do the work; each call is timed on its own."""

    name: str
    ours: bool
    calls: dict[str, Call]  # what is timed, by name: "forward", "training step", "step"
    module: nn.Module | None = None  # with `input`: weighed for what it keeps for backward
    input: Tensor | None = None


@dataclass
class Problem:
    """The same work in several variants."""

    name: str
    variants: list[Variant]
    notes: list[str] = field(default_factory=list)  # variants that could not run, and why
    moved: dict[str, int] = field(default_factory=dict)  # bytes that a call must read and write, where known

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
    _add(problem, Variant(label, ours, calls, weighed, images))


@dataclass(frozen=True)
class Block:
    """A convolution with ReLU and pooling: input [n, c, h, h], weight [k, c, kernel, kernel]."""

    n: int
    c: int
    k: int
    h: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool_size: int = 2
    pool_stride: int = 2
    pool_padding: int = 0

    def __str__(self) -> str:
        text = f"{self.n}, {self.c}→{self.k}, {self.h}, {self.kernel}x{self.kernel}"
        text += f"/{self.stride}" if self.stride > 1 else ""
        return text + ("" if self.pool_size == 2 else f", pool {self.pool_size}/{self.pool_stride}")


BLOCKS = [
    Block(64, 1, 32, 28),
    Block(64, 3, 32, 32, kernel=5, padding=2),
    Block(32, 3, 64, 32),
    Block(1, 3, 64, 224),
    Block(8, 3, 64, 224, kernel=7, stride=2, padding=3, pool_size=3, pool_stride=2, pool_padding=1),
    Block(64, 32, 64, 14),
    Block(32, 64, 64, 32),
    Block(32, 64, 128, 16),
    Block(4, 64, 64, 224),
    Block(8, 256, 256, 28),
]


def blocks(compile: bool, device: str) -> Iterator[Problem]:
    """Forward, and forward with backward, of single blocks; first layers need no gradient of their input."""
    for block in BLOCKS:
        problem = Problem(str(block), [])
        x = torch.randn(block.n, block.c, block.h, block.h, device=device, requires_grad=block.c > 4)
        conv = nn.Conv2d(block.c, block.k, block.kernel, block.stride, block.padding).to(device)
        pool = nn.MaxPool2d(block.pool_size, block.pool_stride, block.pool_padding)
        for ours in (True, False):
            module = dlfast.nn.ConvReLUPool2d.from_modules(conv, pool) if ours else _Plain(conv, pool)
            for mode, channels_last, compiled in MODES + (COMPILED if compile and not ours else []):
                label = ("dlfast" if ours else "PyTorch") + mode
                _add_block(problem, label, ours, module, x, channels_last, compiled)
        yield problem


class _Plain(nn.Module):
    def __init__(self, conv: nn.Conv2d, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.pool(F.relu(self.conv(x)))
        return output


def _add_block(
    problem: Problem,
    label: str,
    ours: bool,
    module: nn.Module,
    x: Tensor,
    channels_last: bool,
    compiled: bool,
) -> None:
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
    run: Callable[[Tensor], Tensor] = torch.compile(module) if compiled else module
    with torch.no_grad():
        grad = torch.randn_like(module(x))

    def forward() -> None:
        with torch.no_grad():
            run(x)

    def both() -> None:
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        run(x).backward(grad)  # type: ignore[no-untyped-call]

    calls: dict[str, Call] = {"forward": forward, "forward + backward": both}
    _add(problem, Variant(label, ours, calls, None if compiled else module, x))


def _add(problem: Problem, variant: Variant) -> None:
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
