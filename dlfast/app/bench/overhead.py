"""What a call costs where there is next to nothing to compute: optimizer steps and blocks of a few numbers.

Each time is that of one of many calls between two looks at the clock. It is what small networks pay, and on a GPU
how long the host is busy with a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import dlfast
from dlfast.app.bench import layers, optim
from dlfast.app.bench.problems import Problem, Variant

CALLS = 200  # between two looks at the clock
TENSORS = 10  # LeNet's
STEPS, BLOCKS = "optimizer step", "block"


def problems(device: str) -> Iterator[Problem]:
    """Steps over ten empty tensors and over ten of one number; a block over one image of 8x8 numbers."""
    for algorithm in optim.OPTIONS:
        for kind, size in (("empty tensors", 0), ("tensors of one number", 1)):
            yield _step(algorithm, f"{TENSORS} {kind}", size, device)
    for of_input in (False, True):
        yield _block(of_input, device)


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
