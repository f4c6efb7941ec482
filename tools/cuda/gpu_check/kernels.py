"""Every kind of CUDA kernel once, on small problems: what the tools of compute-sanitizer watch.

Without pytest, whose start alone takes minutes under them. Each step is printed before it runs and ends with the
operators that have run, so that a finding in the output belongs to the step above it. Whether results are right is for
the tests to say.

    python -m tools.cuda.gpu_check.kernels
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dlfast
from dlfast.app.bench.gpu import forced

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX: dict[str, Any] = {"pool_size": 2}
OVERLAPPING: dict[str, Any] = {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}
AVERAGE: dict[str, Any] = {"pool": "avg", "pool_size": 2}
NONE: dict[str, Any] = {"pool": None}
# [n, c, h, h], channels of the output, kernel, stride: few channels, more than one tile of many, and strided.
CONVOLUTIONS = (((2, 3, 17), 21, 5, 1), ((1, 40, 18), 72, 3, 1), ((2, 8, 16), 64, 3, 2))
# What each optimizer does beside its update, one after the other, and of one of them an update of its own.
AMSGRAD: dict[str, Any] = {"amsgrad": True}
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"max_grad_norm": 1.0, "ema_decay": 0.9, "zero_grad_after_step": True},
    {"state_dtype": "int8"},
    {"state_dtype": torch.bfloat16, "max_grad_value": 0.5},
)
LOWER: tuple[dict[str, Any], ...] = ({}, {"master_weights": True}, {"stochastic_rounding": True})
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {},
    "AdamW": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {},
    "Lion": {},
    "LAMB": {},
}


def main(device: str = "cuda") -> None:
    for name, step in steps(device):
        print(f"{name} ...", flush=True)
        with dlfast.ran.watch() as ran:
            step()
            if device == "cuda":
                torch.cuda.synchronize()
        print("  " + "; ".join(f"{r.operator} {r.part} {r.algorithm} {r.calls}x" for r in ran), flush=True)
    print("all steps have run", flush=True)


def steps(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The name of each step, and the step."""
    for dtype in DTYPES:
        words = str(dtype).removeprefix("torch.")
        for algorithm in ("single", "pytorch"):
            yield f"convolutions, {algorithm}, {words}", partial(convolutions, device, algorithm, dtype)
        yield f"pooling, {words}", partial(pooling, device, dtype)
        yield f"normalisation, {words}", partial(normalisation, device, dtype)
    yield "convolutions, single, fma", partial(without_tensor_cores, device)
    yield "chains", partial(chains, device)
    for name in OPTIMIZERS:
        yield f"optimizers, {name}", partial(optimizers, device, name)
    yield "optimizers, scaled", partial(scaled, device)


def convolutions(device: str, algorithm: str, dtype: torch.dtype) -> None:
    """Forward and all gradients; what the single kernel does not take, PyTorch's convolution does."""
    for (n, c, size), k, kernel, stride in CONVOLUTIONS:
        for window in (MAX, OVERLAPPING, AVERAGE, NONE):
            x = made(device, dtype, n, c, size, size)
            weight, bias = made(device, dtype, k, c, kernel, kernel), made(device, dtype, k)
            with forced(algorithm):
                y = dlfast.conv_relu_pool2d(x, weight, bias, stride=stride, padding=kernel // 2, **window)
                backward(y)


def without_tensor_cores(device: str) -> None:
    with math_mode("fma"):
        convolutions(device, "single", torch.float32)


def pooling(device: str, dtype: torch.dtype) -> None:
    for window, last in itertools.product((MAX, OVERLAPPING, AVERAGE, NONE), (True, False)):
        x = made(device, dtype, 2, 19, 15, 15, channels_last=last)
        backward(dlfast.nn.relu_pool2d(x, **window))


def normalisation(device: str, dtype: torch.dtype) -> None:
    for window, last, training in itertools.product((MAX, OVERLAPPING, NONE), (True, False), (True, False)):
        x = made(device, dtype, 2, 24, 15, 15, channels_last=last)
        mean, var = torch.zeros(24, device=device), torch.ones(24, device=device)
        weight, bias = made(device, torch.float32, 24), made(device, torch.float32, 24)
        y = dlfast.nn.batch_norm_relu_pool2d(x, mean, var, weight, bias, training=training, **window)
        backward(y)


def chains(device: str) -> None:
    """Convolution and normalisation as one node, with and without autocast."""
    layers = [nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(24, 40, 3, bias=False), nn.BatchNorm2d(40), nn.ReLU()]
    images = made(device, torch.float32, 2, 3, 20, 20).detach()
    model = dlfast.fuse(nn.Sequential(*layers).to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]
    for lower in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=lower):
            y = model(images)
        backward(y)
    model.eval()(images)


def optimizers(device: str, name: str) -> None:
    """Lists of sizes that are and are not multiples of a vector; two steps, the second with states."""
    makes = [(torch.float32, extra) for extra in EXTRAS]
    makes += [(dtype, extra) for dtype in (torch.bfloat16, torch.float16) for extra in LOWER]
    makes += [(torch.float32, AMSGRAD)] if name == "Adam" else []
    for dtype, extra in makes:
        parameters = [nn.Parameter(torch.randn(size, device=device, dtype=dtype)) for size in (1, 255, 4099, 0)]
        optimizer = getattr(dlfast.optim, name)(parameters, **OPTIMIZERS[name], **extra)
        for _ in range(2):
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()


def scaled(device: str) -> None:
    """Unscaling within the step, and a step with an infinity, which is skipped."""
    weight = nn.Parameter(torch.randn(1000, device=device))
    optimizer = dlfast.optim.AdamW([weight], fused=True)
    scaler = torch.amp.GradScaler(device)
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()


def backward(y: Tensor) -> None:
    y.sum().backward()  # type: ignore[no-untyped-call]


def made(device: str, dtype: torch.dtype, *shape: int, channels_last: bool = True) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    if len(shape) == 4 and channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


@contextmanager
def math_mode(name: str) -> Iterator[None]:
    os.environ["DLFAST_MATH_MODE"] = name
    try:
        yield
    finally:
        del os.environ["DLFAST_MATH_MODE"]


if __name__ == "__main__":
    main()
