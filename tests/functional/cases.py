"""The grid of problems that every test of the convolution blocks shares, and how results are compared.

Data come in two kinds. Small integers make every product and sum exact in every dtype, so results must be
equal to the last bit and ties are frequent. Normal numbers are compared with float64, within a bound that
follows from the dtype and the number of terms.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dlfast import reference
from dlfast._native import native
from dlfast.functional.arguments import pair, same_padding
from dlfast.ran import Ran, watch


@dataclass(frozen=True)
class Case:
    """One problem: input [n, c, h, w], weight [k, c / groups, *kernel]."""

    n: int = 2
    c: int = 3
    h: int = 9
    w: int = 11
    k: int = 5
    kernel: tuple[int, int] = (3, 3)
    conv: dict[str, Any] = field(default_factory=dict)
    pool: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return {**self.conv, **self.pool}

    @property
    def terms(self) -> int:
        """Products in one element of the convolution output."""
        return self.kernel[0] * self.kernel[1] * self.c // self.conv.get("groups", 1)

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.n}x{self.c}x{self.h}x{self.w}-{self.k}x{self.kernel[0]}x{self.kernel[1]}-{options}"


POOLS: list[dict[str, Any]] = [
    {},
    {"activation": None},
    {"pool": "avg"},
    {
        "pool": "avg",
        "activation": None,
        "pool_size": 3,
        "pool_stride": 2,
        "pool_padding": 1,
        "ceil_mode": True,
    },
    {"pool": None},
    {"pool": None, "activation": None},
    {"pool_size": 3},
    {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    {"pool_size": 3, "pool_stride": 2, "ceil_mode": True},
    {"pool_size": (3, 2), "pool_stride": 1, "activation": None},
    {"pool_size": 2, "pool_stride": 3},
    {"pool_size": (2, 3), "pool_stride": (2, 1), "pool_padding": (1, 1), "ceil_mode": True},
]

CONVS: list[Case] = [
    *(Case(kernel=(k, k), conv={"padding": k // 2}) for k in range(1, 8)),
    Case(kernel=(5, 2), conv={"padding": (2, 0)}),
    Case(conv={"stride": 2}),
    Case(h=13, conv={"stride": (1, 2), "padding": (0, 2)}),
    Case(h=13, w=14, conv={"dilation": 2}),
    Case(h=13, w=14, conv={"dilation": (1, 3), "padding": 3}),
    Case(kernel=(3, 1), conv={"dilation": (2, 2), "padding": 1}),
    Case(c=4, k=6, conv={"groups": 2, "padding": 1}),
    Case(c=6, k=6, conv={"groups": 6, "padding": 1}),
    # As many outputs as one of the CPU's blocks has (8, 16 or 32, by the SIMD level), in several groups.
    Case(c=8, k=8, conv={"groups": 8, "padding": 1}),
    Case(c=16, k=16, conv={"groups": 16, "padding": 1}),
    Case(c=32, k=32, conv={"groups": 8, "stride": 2, "padding": 1}),
    Case(c=4, k=8, conv={"groups": 4, "stride": 2, "padding": 2}),
    Case(c=1, k=32, h=14, w=14, conv={"padding": 1}),
    Case(c=1, k=16, h=7, w=6, conv={"padding": 1}),
    Case(c=3, k=33, h=10, w=8, conv={"padding": 1}),
    Case(c=17, k=16, h=8, w=8, conv={"padding": 1}),
    Case(c=32, k=70, h=9, w=9, conv={"padding": 1}),
    Case(c=16, k=12, h=11, w=12, kernel=(5, 5), conv={"padding": 2, "stride": (1, 2)}),
    Case(c=20, k=24, h=10, w=35, kernel=(2, 4), conv={"padding": (0, 2), "groups": 2}),
    Case(n=1, c=2, k=8, h=40, w=5, conv={"padding": 1}),
    Case(n=5, c=2, k=9, h=4, w=30, kernel=(1, 7), conv={"padding": (0, 3)}),
    Case(n=1, c=1, k=1, h=3, w=3, conv={"padding": 2}),
    Case(n=0, conv={"padding": 1}),
]

# One kernel per channel, channels around the lanes of a register, and all that moves the border.
DEPTHWISE: list[Case] = [
    Case(c=c, k=c, h=h, w=w, kernel=kernel, conv={"groups": c, **conv}, pool={"pool": None, "activation": activation})
    for c, h, w, kernel, conv in [
        (1, 9, 11, (3, 3), {"padding": 1}),
        (7, 9, 30, (3, 3), {"padding": 1}),
        (8, 14, 19, (3, 3), {"stride": 2, "padding": 1}),
        (9, 13, 14, (5, 5), {"padding": 2}),
        (15, 8, 9, (1, 1), {}),
        (16, 12, 28, (5, 5), {"stride": 2, "padding": 2}),
        (17, 7, 7, (7, 7), {"padding": 3}),
        (23, 10, 12, (2, 2), {"padding": 1}),
        (33, 2, 3, (5, 5), {"padding": 2}),
        (33, 11, 9, (4, 6), {"stride": (3, 1), "padding": (5, 2)}),
        (40, 14, 15, (3, 3), {"dilation": 2, "padding": 2}),
        (24, 13, 20, (3, 5), {"stride": (2, 3), "dilation": (3, 2), "padding": (4, 1)}),
        (64, 9, 9, (2, 3), {"stride": 4, "padding": 1}),
        (160, 6, 6, (5, 5), {"padding": 2}),
    ]
    for activation in (None, "relu")
]

GRID: list[Case] = [*(replace(conv, pool=pool) for conv, pool in itertools.product(CONVS, POOLS)), *DEPTHWISE]

# One case of each kind, for tests that cost more.
SAMPLE: list[Case] = [
    Case(c=1, k=32, h=14, w=14, conv={"padding": 1}),
    Case(conv={"padding": 1}, pool={"pool_size": 3, "pool_stride": 2, "pool_padding": 1}),
    Case(conv={"padding": 1}, pool={"pool": "avg"}),
    Case(pool={"pool": "avg", "activation": None}),
    Case(pool={"pool": None}),
    Case(c=4, k=6, conv={"groups": 2, "padding": 1}, pool={"activation": None}),
    Case(c=16, k=16, conv={"groups": 4, "padding": 1}, pool={"pool": None}),
    Case(c=17, k=17, conv={"groups": 17, "padding": 1}, pool={"pool": None, "activation": None}),
]


def integers(case: Case, dtype: torch.dtype, seed: int = 0, bias: bool = True) -> list[Tensor]:
    """Input, weight and bias of small whole numbers, exact in `dtype` through the whole block."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, high: int) -> Tensor:
        return torch.randint(-high, high + 1, shape, generator=generator).to(dtype)

    weight = draw(case.k, case.c // case.conv.get("groups", 1), *case.kernel, high=1)
    tensors = [draw(case.n, case.c, case.h, case.w, high=1), weight]
    return [*tensors, draw(case.k, high=2)] if bias else tensors


def normals(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (case.n, case.c, case.h, case.w),
        (case.k, case.c // case.conv.get("groups", 1), *case.kernel),
        (case.k,),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers laid out differently in memory."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        n, c, h, w = tensor.shape
        wide = tensor.new_full((n, c + 1, h + 2, 2 * w + 1), float("nan"))
        wide[:, 1:, 1:-1, 1::2] = tensor
        return wide[:, 1:, 1:-1, 1::2]
    if layout == "offset":
        flat = tensor.new_empty(tensor.numel() + 1)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    assert layout == "contiguous"
    return tensor


LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset"]


def run(function: Any, tensors: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Output of `function` and the gradients of its inputs, for a fixed integer gradient of the output."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves, **options)
    grad = torch.arange(output.numel(), device=output.device).remainder(5).sub(2).to(output.dtype)
    output.backward(grad.view(output.shape))
    return output.detach(), [leaf.grad for leaf in leaves]


def report(
    input: Tensor, weight: Tensor, conv: Sequence[Any], pooling: Sequence[Any], bias: Tensor | None = None
) -> Any:
    """What is chosen for a block that keeps its winner mask, as the extension says it.

    Args:
        conv: stride, padding, dilation and groups, the first three as pairs.
        pooling: activation, pool, pool_size, pool_stride, pool_padding and ceil_mode.
    """
    names = [
        "stride", "padding", "dilation", "groups",
        "activation", "pool", "pool_size", "pool_stride", "pool_padding", "ceil_mode",
    ]  # fmt: skip
    options = dict(zip(names, [*conv, *pooling], strict=True))
    return native.module.report_block(
        input=input, weight=weight, bias=bias, save_winner_mask=True, flops=1.0, bandwidth=1.0, **options
    )


def candidates(input: Tensor, weight: Tensor, conv: Sequence[Any], pooling: Sequence[Any], part: str) -> list[str]:
    """The algorithms that take a part of a block."""
    return [c.algorithm for c in getattr(report(input, weight, conv, pooling), part).candidates]


def chosen(input: Tensor, weight: Tensor, conv: Sequence[Any], pooling: Sequence[Any]) -> dict[str, str]:
    """The algorithm of each part of a block."""
    found = report(input, weight, conv, pooling)
    choices = {part: getattr(found, part) for part in ("forward", "grad_input", "grad_weight")}
    return {part: choice.candidates[choice.best].algorithm for part, choice in choices.items()}


def chosen_algorithms(tensors: list[Tensor], options: dict[str, Any]) -> dict[str, str]:
    """What is chosen for forward, grad_input and grad_weight of `tensors`."""
    input, weight, *_ = tensors
    input = input if input.dim() == 4 else input.unsqueeze(0)
    conv = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    dilation, padding = pair("dilation", conv["dilation"]), conv["padding"]
    if isinstance(padding, str):
        padding, extra = same_padding(weight.shape[2:], dilation) if padding == "same" else ((0, 0), None)
        input = input if extra is None else torch.nn.functional.pad(input, extra)
    window = options.get("pool_size", 2)
    return chosen(
        input,
        weight,
        (pair("stride", conv["stride"]), pair("padding", padding), dilation, conv["groups"]),
        (
            options.get("activation", "relu"), options.get("pool", "max"), pair("pool_size", window),
            pair("pool_stride", options.get("pool_stride") or window),
            pair("pool_padding", options.get("pool_padding", 0)), options.get("ceil_mode", False),
        ),
    )  # fmt: skip


def algorithms_of(ran: list[Ran]) -> dict[str, str]:
    """The algorithm of each part of the one convolution that has run."""
    mine = [each for each in ran if each.operator == "conv_relu_pool2d"]
    parts = [each.part for each in mine]
    assert len(parts) == len(set(parts)), mine
    return {each.part: each.algorithm for each in mine}


def run_as_chosen(function: Any, tensors: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """`run`, and a check that what was chosen is what ran, as it does where all numbers are finite."""
    with watch() as ran:
        output, grads = run(function, tensors, options)
    if native.module is None or not output.numel():
        return output, grads
    expected = chosen_algorithms(tensors, options)
    alone = options.get("activation", "relu") is None and options.get("pool", "max") is None
    if not (alone and set(expected.values()) == {"pytorch"}):  # then it is PyTorch's convolution, and nothing of ours
        assert algorithms_of(ran) == expected
    return output, grads


def winograd_accepts(case: Case) -> bool:
    dense = all(case.conv.get(name, 1) in (1, (1, 1)) for name in ("stride", "dilation"))
    return case.kernel == (3, 3) and dense


def assert_forced(case: Case, tensors: list[Tensor]) -> None:
    """The algorithm that DLFAST_ALGORITHM names is chosen, wherever it takes the problem with its winner mask kept."""
    forced, dtype = os.environ["DLFAST_ALGORITHM"], tensors[0].dtype
    pool, activation = (case.pool.get(name, default) for name, default in [("pool", "max"), ("activation", "relu")])
    needs_mask = pool == "avg" and activation == "relu"
    if forced == "pytorch" or needs_mask or dtype == torch.float64 or tensors[0].numel() == 0:
        algorithm = "pytorch"
    elif forced.startswith("winograd") and winograd_accepts(case):
        algorithm = forced
    elif not forced.startswith("winograd") and pool is None and case.c == case.k == case.conv.get("groups", 1):
        algorithm = "depthwise"
    else:
        algorithm = "direct"
    if native.module is not None:
        assert chosen_algorithms(tensors, case.options)["forward"] == algorithm


def forward_bound(case: Case, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """How far a result in `dtype` may be from float64, element by element.

    A sum of n products in float32 is off by at most about n * eps of the sum of their absolute values, and
    typically by sqrt(n) * eps; 4 * (sqrt(n) + 1) leaves room for every order of summation. 16-bit results
    are rounded twice more (the convolution output and the result), average pooling by as much again.
    """
    magnitude = reference.conv_relu_pool2d(*(t.double().abs() for t in tensors), **case.options)
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = 4 * (case.terms**0.5 + 1) * accumulate
    if dtype in (torch.bfloat16, torch.float16):
        bound += 2 * torch.finfo(dtype).eps
    return magnitude * bound + torch.finfo(dtype).tiny
