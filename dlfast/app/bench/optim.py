"""Optimizer steps over the parameters of four networks: the update alone, and the whole tail of a training step.

The tail is what follows backward in a run with loss scaling: look for infinities and unscale, clip by the
global norm, update, average the weights, clear the gradients. In PyTorch it is written with its fastest
functions for each; in dlfast it is one step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dlfast
from dlfast.app.bench.problems import Call, Problem, Variant

LISTS = ("lenet", "mobilenet", "resnet50", "vgg11")
TARGETS = ("optim", *(f"optim-{name}" for name in LISTS))
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "AdamW": {"lr": 1e-3}}
TORCH_MODES: dict[str, dict[str, bool]] = {
    "PyTorch for-loop": {"foreach": False, "fused": False},
    "PyTorch foreach": {"foreach": True},
    "PyTorch fused": {"fused": True},
}
MAX_NORM, DECAY, SCALE = 1.0, 0.999, 1024.0
# Arrays that a step must read and write at least, beside the states: parameter and gradient in, parameter out;
# for the tail also the gradient once more for the norm, the average in and out, and the gradient cleared.
PLAIN_ACCESSES, TAIL_ACCESSES = 3, 7


def shapes_of(name: str) -> list[torch.Size]:
    """The parameters of a network, largest list last.

    >>> len(shapes_of("lenet"))
    10
    """
    if name == "lenet":
        return [p.shape for p in dlfast.models.lenet().parameters()]
    import torchvision

    models = torchvision.models
    build = {"mobilenet": models.mobilenet_v3_large, "resnet50": models.resnet50, "vgg11": models.vgg11}[name]
    with torch.device("meta"):
        return [p.shape for p in build().parameters()]


def problems(targets: list[str], device: str) -> Iterator[Problem]:
    """Plain step and tail of SGD and AdamW over each list that `targets` ask for."""
    for name in LISTS:
        if "optim" in targets or f"optim-{name}" in targets:
            shapes = shapes_of(name)
            for algorithm in OPTIONS:
                yield _problem(name, shapes, algorithm, device)


def _problem(name: str, shapes: list[torch.Size], algorithm: str, device: str) -> Problem:
    options = OPTIONS[algorithm]
    states = 1 if algorithm == "SGD" else 2
    parameters = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    count = sum(p.numel() for p in parameters)
    problem = Problem(f"{algorithm}, {name} ({len(shapes)} tensors, {count / 1e6:.2f} M)", [])
    problem.moved = {
        "plain step": 4 * count * (PLAIN_ACCESSES + 2 * states),
        "full tail": 4 * count * (TAIL_ACCESSES + 2 * states),
    }
    ours, theirs = getattr(dlfast.optim, algorithm), getattr(torch.optim, algorithm)
    plain = ours(parameters, **options)
    tail = ours(parameters, **options, max_grad_norm=MAX_NORM, ema_decay=DECAY, zero_grad_after_step=True)
    tail.grad_scale = torch.tensor(SCALE, device=device)
    problem.variants.append(Variant("dlfast", True, {"plain step": plain.step, "full tail": tail.step}))
    average = [p.detach().clone() for p in parameters]
    for label, mode in TORCH_MODES.items():
        optimizer = theirs(parameters, **options, **mode)
        calls: dict[str, Call] = {
            "plain step": optimizer.step,
            "full tail": _torch_tail(optimizer, parameters, average, device),
        }
        problem.variants.append(Variant(label, False, calls))
    return problem


def _torch_tail(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], average: list[Tensor], device: str
) -> Callable[[], None]:
    found_inf, inverse = torch.zeros((), device=device), torch.tensor(1 / SCALE, device=device)

    def tail() -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inverse)
        if device == "cpu" and found_inf.item():
            return
        nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - DECAY)
        optimizer.zero_grad(set_to_none=False)

    return tail


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by ``copy_`` of 256 MB, larger than any cache: the median of ten."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    seconds = []
    for number in range(12):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(seconds)
