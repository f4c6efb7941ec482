"""``dlfast bench gpu``: blocks and optimizer steps on a GPU against PyTorch at its best there.

Blocks run in channels_last by each algorithm of dlfast, and in PyTorch with ``torch.backends.cudnn.benchmark``, in both
formats, and with ``torch.compile(mode="max-autotune")``; optimizer steps against torch's fused ones, and against Apex's
and those of other libraries where they are installed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

import dlfast
from dlfast.app.bench import layers, optim, peers, problems, traffic
from dlfast.app.bench.problems import Call, Problem, Variant

# Beside what dlfast chooses itself.
FORCED = ("pytorch", "single")
# (network, layer) of traffic.layers, and whether torch.compile is tried: max-autotune takes half a minute for each.
BLOCKS = {
    ("mnistnet", "conv1"): True,
    ("mnistnet", "conv2"): False,
    ("lenet", "conv1"): False,
    ("resnet", "stem"): True,
    ("vgg16", "conv1_1"): False,
    ("vgg16", "conv1_2"): True,
    ("vgg16", "conv3_3"): True,
    ("vgg16", "conv5_3"): False,
}
DTYPES = (torch.float16, torch.float32)
CALLS = 10  # between two looks at the clock: one alone would be measured with its launch


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Blocks called inside go by that algorithm; None leaves it to dlfast."""
    before = os.environ.pop("DLFAST_ALGORITHM", None)
    if name is not None:
        os.environ["DLFAST_ALGORITHM"] = name
    try:
        yield
    finally:
        os.environ.pop("DLFAST_ALGORITHM", None)
        if before is not None:
            os.environ["DLFAST_ALGORITHM"] = before


def gpu_problems(compile: bool) -> Iterator[Problem]:
    """Everything, blocks first."""
    torch.backends.cudnn.benchmark = True
    of_name = {(layer.network, layer.name): layer for layer in traffic.layers()}
    for dtype in DTYPES:
        for name, compiles in BLOCKS.items():
            problem = block_problem(of_name[name], dtype, "cuda", compile and compiles and dtype == torch.float16)
            problem.calls = CALLS
            yield problem
    for parameters in ("resnet50", "mobilenet"):
        steps = chain(optim.problems([f"optim-{parameters}"], "cuda"), peers.problems([parameters], "cuda"))
        for problem in steps:
            problem.calls = CALLS
            yield problem


def block_problem(layer: traffic.Layer, dtype: torch.dtype, device: str, compile: bool) -> Problem:
    """Forward, and forward with backward, of one block."""
    conv = nn.Conv2d(layer.c, layer.k, layer.kernel, layer.stride, layer.padding, bias=layer.bias)
    conv = conv.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pool = nn.MaxPool2d(layer.pool_size, layer.pool_stride, layer.pool_padding) if layer.pool_size else None
    x = torch.randn(layer.n, layer.c, layer.h, layer.h, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(layer.needs_grad_input)
    ours, plain = dlfast.nn.ConvReLUPool2d.from_modules(conv, pool), layers.Plain(conv, pool)
    tolerance = 1e-2 if dtype.itemsize == 2 else 5e-3  # float32 products may be TF32's
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    grad = torch.randn_like(expected)
    problem = Problem(f"{layer.network} {layer.name}, batch {layer.n}, {str(dtype).removeprefix('torch.')}", [])
    item = dtype.itemsize
    problem.moved = {"forward": traffic.compulsory(layer, item)}
    _add(problem, "dlfast", ours, conv, x, grad)
    for name in FORCED:
        if name == "single" and not layer.has_single_kernel():
            continue
        _add(problem, f"dlfast {name}", ours, conv, x, grad, name)
    first = copy.deepcopy(conv).to(memory_format=torch.contiguous_format)
    images = x.detach().contiguous().requires_grad_(layer.needs_grad_input)
    _add(problem, "PyTorch", layers.Plain(first, pool), first, images, grad.contiguous())
    _add(problem, "PyTorch channels_last", plain, conv, x, grad)
    if compile:
        compiled = torch.compile(plain, mode="max-autotune")
        _add(problem, "PyTorch compile max-autotune channels_last", compiled, conv, x, grad)
    return problem


def _add(
    problem: Problem, label: str, run: Callable[[Tensor], Tensor], conv: nn.Conv2d, x: Tensor, grad: Tensor,
    algorithm: str | None = None,
) -> None:  # fmt: skip
    def forward() -> None:
        with forced(algorithm), torch.no_grad():
            run(x)

    # Returned, not accumulated: what accumulates belongs to a stream, which a capture of this may not be on.
    inputs = [*conv.parameters(), *([x] if x.requires_grad else [])]

    def both() -> None:
        with forced(algorithm):
            torch.autograd.grad(run(x), inputs, grad)

    calls: dict[str, Call] = {"forward": forward, "forward + backward": both}
    problems.add(problem, Variant(label, label.startswith("dlfast"), calls))
