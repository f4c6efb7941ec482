"""Wall time of whole training steps: as a user sees it, launched by a CUDA graph, and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dlfast.app.bench.problems import Variant
from tools.cuda.gpu_check.networks import Mode, Network, Training, networks
from tools.cuda.gpu_check.trial import Makers, Trial, add, summary

CALLS = 5  # between two looks at the clock
STEPS = 4  # that a graph is compared over
STILL = 1e-9  # learning rate where the same labels come again and again: others end in infinities

EAGER = [Mode(ours, channels_last) for ours in (False, True) for channels_last in (False, True)]
GRAPHED = [Mode(ours, launched="graphed") for ours in (False, True)]
COMPILED = [
    Mode(ours, launched=launched) for ours in (False, True) for launched in ("compile", "compile reduce-overhead")
]
# What compiles in the time there is, and networks that graphs have to give the same numbers for: without dropout.
TO_COMPILE = ("mnistnet", "vgg11_bn", "resnet18", "resnet50", "speed run")
TO_COMPARE = ("resnet18", "resnet50", "speed run", "twoconv", "convpool", "mnistnet", "stacked", "lenet")


def network_makers(device: str) -> Makers:
    """Fused, graphed, eager, in both formats."""
    return {
        name: functools.partial(in_modes, name, network, [*EAGER, *GRAPHED], device)
        for name, network in networks().items()
    }


def compile_makers(device: str) -> Makers:
    """torch.compile by default and with reduce-overhead, beside eager and graphed steps, channels_last."""
    modes = [mode for mode in EAGER if mode.channels_last] + GRAPHED + COMPILED
    every = networks()
    return {name: functools.partial(in_modes, name, every[name], modes, device) for name in TO_COMPILE}


def graph_makers(device: str) -> Makers:
    """The graphed step against the plain one: the same losses, and the time."""
    every = networks()
    return {name: functools.partial(against_plain, name, every[name], device) for name in TO_COMPARE}


def in_modes(name: str, network: Network, modes: Sequence[Mode], device: str) -> Iterator[Trial]:
    model, images, labels = prepared(network, device)
    trial = Trial(f"{name}, batch {len(images)}, {products(network)}", [], calls=CALLS)
    for mode in modes:
        make = functools.partial(Training, network, model, images, labels, mode, lr=STILL)
        add(trial, str(mode), mode.ours, functools.partial(variant, str(mode), mode.ours, make))
    yield trial


def against_plain(name: str, network: Network, device: str) -> Iterator[Trial]:
    """Of each side graphed and plain; in its ratios "ours" is the graph."""
    model, images, labels = prepared(network, device)
    for ours in (True, False):
        side = "dlfast" if ours else "PyTorch"
        trial = Trial(f"{name}, batch {len(images)}, {products(network)}, {side}", [], calls=CALLS)
        trainings = [Mode(ours, launched="graphed"), Mode(ours)]
        try:
            compare(*[Training(network, model, images, labels, mode) for mode in trainings])
        except Exception as error:
            trial.failures.append(f"{trial.name}: {summary(error)}")
        for mode in trainings:
            make = functools.partial(Training, network, model, images, labels, mode, lr=STILL)
            graphed = mode.launched == "graphed"
            add(trial, str(mode), True, functools.partial(variant, str(mode), graphed, make))
        yield trial


def compare(graphed: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
    """Both take the same steps, so that their losses are the same.

    Raises:
        AssertionError: they are not, or they do not change, so that nothing was learnt that could be compared.
    """
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    # Otherwise each would have the algorithms that it has timed itself, which round differently.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        losses, expected = ([float(step()) for _ in range(STEPS)] for step in (graphed, plain))
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    changes = max(abs(loss - expected[0]) for loss in expected) / abs(expected[0])
    tolerance = 1e-3
    if not changes > 2 * tolerance:
        raise AssertionError(f"the losses of {STEPS} plain steps are {expected}: too much the same to compare")
    if not all(abs(loss - right) <= tolerance * abs(right) for loss, right in zip(losses, expected, strict=True)):
        raise AssertionError(f"the losses of {STEPS} graphed steps are {losses}, those of plain ones {expected}")


def variant(label: str, ours: bool, make: Callable[[], Training]) -> Variant:
    return Variant(label, ours, {"training step": make()})


def prepared(network: Network, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(network.shape, device=device)
    labels = torch.randint(network.classes, network.shape[:1], device=device)
    return network.make().to(device), images, labels


def products(network: Network) -> str:
    return "bfloat16" if network.lower else "TF32"
