"""What a call costs where there is next to nothing to compute: optimizer steps and blocks of a few numbers.

Each time is that of one of many calls between two looks at the clock. It is what small networks pay, and on a GPU
how long the host is busy with a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import dlfast
from dlfast.app.bench import layers, optim
from dlfast.app.bench.problems import Problem, Variant

CALLS = 200  # between two looks at the clock
TENSORS = 10  # LeNet's
STEPS, BLOCKS, CHAINS = "optimizer step", "block", "chain"
CHANNELS, SIZE = 8, 4  # of the chains' only image


def problems(device: str) -> Iterator[Problem]:
    """Steps over ten empty tensors and over ten of one number; a block over one image of 8x8 numbers; whole chains of
    layers, below autocast too, and one that is folded in evaluation."""
    for algorithm in optim.OPTIONS:
        for kind, size in (("empty tensors", 0), ("tensors of one number", 1)):
            yield _step(algorithm, f"{TENSORS} {kind}", size, device)
    for of_input in (False, True):
        yield _block(of_input, device)
    for pool in (None, nn.MaxPool2d(2)):
        for normalised in (True, False):
            for lower in (False, True):
                yield _chain(normalised, pool, lower, device)
    yield _folded(device)


def _step(algorithm: str, name: str, size: int, device: str) -> Problem:
    parameters = [nn.Parameter(torch.randn(size, device=device)) for _ in range(TENSORS)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    options = optim.OPTIONS[algorithm]
    ours, theirs = getattr(dlfast.optim, algorithm), getattr(torch.optim, algorithm)
    variants = [Variant("dlfast", True, {"step": ours(parameters, **options).step})]
    for label, mode in optim.TORCH_MODES.items():
        variants.append(Variant(label, False, {"step": theirs(parameters, **options, **mode).step}))
    return Problem(f"{algorithm}, {name}", variants, group=STEPS, calls=CALLS)


def _block(of_input: bool, device: str) -> Problem:
    conv, pool = layers.Block(BLOCKS, "smallest", 1, 1, 1, 8).modules()
    conv.to(device)
    x = torch.randn(1, 1, 8, 8, device=device, requires_grad=of_input)
    ours, plain = dlfast.nn.ConvReLUPool2d.from_modules(conv, pool), layers.Plain(conv, pool)
    layers.check_equal(ours, plain, x)
    name = "3x3 block of 1x1x8x8" + (", gradient of the input" if of_input else "")
    problem = Problem(name, [], group=BLOCKS, calls=CALLS)
    layers.add_block(problem, "dlfast", True, ours, x, channels_last=False, compiled=False)
    layers.add_block(problem, "PyTorch", False, plain, x, channels_last=False, compiled=False)
    return problem


def _chain(normalised: bool, pool: nn.MaxPool2d | None, lower: bool, device: str) -> Problem:
    """A training step's forward and backward, all gradients taken, of one layer of ours and of those it replaces."""
    parts = layers_of(normalised, pool, device)
    ours, plain = fused(parts), nn.Sequential(*parts)
    x = torch.randn(1, CHANNELS, SIZE, SIZE, device=device, requires_grad=True)
    grad = torch.randn_like(plain(x), dtype=torch.bfloat16 if lower else None)
    parameters = list(plain.parameters())

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            for p in parameters:
                p.grad = None
            with torch.autocast(device, torch.bfloat16, enabled=lower):
                output = model(x)
            output.backward(grad)

        return run

    names = ["conv", *(["bn"] if normalised else []), "relu", *(["max pool"] if pool is not None else [])]
    name = " → ".join(names) + (", bfloat16 autocast" if lower else "")
    calls = [Variant(label, label == "dlfast", {"forward + backward": step(model)}, None)
             for label, model in (("dlfast", ours), ("PyTorch", plain))]  # fmt: skip
    return Problem(name, calls, group=CHAINS, calls=CALLS)


def _folded(device: str) -> Problem:
    parts = layers_of(True, None, device)
    ours, plain = fused(parts).eval(), nn.Sequential(*parts).eval()
    x = torch.randn(1, CHANNELS, SIZE, SIZE, device=device)

    def forward(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(x)

        return run

    calls = [Variant(label, label == "dlfast", {"forward": forward(model)}, None)
             for label, model in (("dlfast", ours), ("PyTorch", plain))]  # fmt: skip
    return Problem("conv → bn → relu, folded in evaluation", calls, group=CHAINS, calls=CALLS)


def layers_of(normalised: bool, pool: nn.MaxPool2d | None, device: str) -> list[nn.Module]:
    """The layers of a chain."""
    found: list[nn.Module] = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)]
    found += [nn.BatchNorm2d(CHANNELS)] if normalised else []
    found += [nn.ReLU()] + ([pool] if pool is not None else [])
    return [layer.to(device) for layer in found]


def fused(plain: list[nn.Module]) -> nn.Module:
    """One layer of ours with the parameters of these."""
    conv, pool = plain[0], plain[-1]
    assert isinstance(conv, nn.Conv2d)
    end = pool if isinstance(pool, nn.MaxPool2d) else None
    if isinstance(plain[1], nn.BatchNorm2d):
        return dlfast.nn.ConvBNReLUPool2d.from_modules(conv, plain[1], end)
    return dlfast.nn.ConvReLUPool2d.from_modules(conv, end)
