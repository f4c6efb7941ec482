"""Single blocks: a convolution with the ReLU and the pooling after it, as they stand in well-known networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlfast
from dlfast.app.bench.problems import COMPILED, MODES, Call, Problem, Variant, Work, add
from dlfast.choice import choose


@dataclass(frozen=True)
class Block:
    """Input [n, c, h, h], weight [k, c / groups, kernel, kernel]; without pooling if pool_size is 0."""

    group: str
    name: str
    n: int
    c: int
    k: int
    h: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1
    pool_size: int = 2
    pool_stride: int = 2
    pool_padding: int = 0

    def __str__(self) -> str:
        text = f"{self.name}: {self.n}, {self.c}→{self.k}, {self.h}, {self.kernel}x{self.kernel}"
        text += f"/{self.stride}" if self.stride > 1 else ""
        text += f", {self.groups} groups" if self.groups > 1 else ""
        if self.pool_size == 0:
            return text + ", no pool"
        return text + ("" if self.pool_size == 2 else f", pool {self.pool_size}/{self.pool_stride}")

    def modules(self) -> tuple[nn.Conv2d, nn.MaxPool2d | None]:
        conv = nn.Conv2d(self.c, self.k, self.kernel, self.stride, self.padding, groups=self.groups)
        return conv, nn.MaxPool2d(self.pool_size, self.pool_stride, self.pool_padding) if self.pool_size else None


FIRST, WIDE, OTHER = "first layers", "wide 3x3 with pooling", "other"
BLOCKS = [
    Block(FIRST, "mnist", 64, 1, 32, 28),
    Block(FIRST, "lenet", 64, 3, 32, 32, kernel=5, padding=2),
    Block(FIRST, "cifar", 32, 3, 64, 32),
    Block(FIRST, "vgg, batch 1", 1, 3, 64, 224),
    Block(FIRST, "photographs", 4, 1, 32, 289),
    Block(FIRST, "resnet stem", 8, 3, 64, 224, 7, 2, 3, pool_size=3, pool_padding=1),
    Block(FIRST, "resnet stem, batch 1", 1, 3, 64, 224, 7, 2, 3, pool_size=3, pool_padding=1),
    Block(FIRST, "alexnet 1", 8, 3, 64, 224, 11, 4, 2, pool_size=3),
    Block(WIDE, "mnist 2", 64, 32, 64, 14),
    Block(WIDE, "cifar 2", 32, 64, 64, 32),
    Block(WIDE, "cifar 3", 32, 64, 128, 16),
    Block(WIDE, "cifar 2, batch 1", 1, 64, 64, 32),
    Block(WIDE, "vgg 2", 2, 64, 64, 224),
    Block(WIDE, "vgg 4", 2, 128, 128, 112),
    Block(WIDE, "vgg 7", 4, 256, 256, 56),
    Block(WIDE, "vgg 13", 8, 512, 512, 14),
    Block(WIDE, "square", 8, 256, 256, 28),
    Block(OTHER, "alexnet 2", 16, 64, 192, 27, 5, padding=2, pool_size=3),
    Block(OTHER, "alexnet 5", 16, 256, 256, 13, pool_size=3),
    Block(OTHER, "grouped", 16, 64, 64, 28, groups=4),
    Block(OTHER, "depthwise", 16, 64, 64, 56, groups=64),
    Block(OTHER, "conv and ReLU", 32, 64, 64, 32, pool_size=0),
    Block(OTHER, "pointwise", 16, 64, 128, 28, kernel=1, padding=0),
]


class Plain(nn.Module):
    """The modules of a block one after the other."""

    def __init__(self, conv: nn.Conv2d, pool: nn.MaxPool2d | None) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool

    def forward(self, x: Tensor) -> Tensor:
        output = F.relu(self.conv(x))
        return output if self.pool is None else self.pool(output)


def problems(compile: bool, device: str) -> Iterator[Problem]:
    """Forward, and forward with backward, of single blocks; first layers need no gradient of their input."""
    for block in BLOCKS:
        conv, pool = block.modules()
        conv.to(device)
        x = torch.randn(block.n, block.c, block.h, block.h, device=device, requires_grad=block.group != FIRST)
        ours, plain = dlfast.nn.ConvReLUPool2d.from_modules(conv, pool), Plain(conv, pool)
        check_equal(ours, plain, x)
        problem = Problem(str(block), [], group=block.group, work=work_of(ours, x))
        for fused in (True, False):
            for mode, channels_last, compiled in MODES + (COMPILED if compile and not fused else []):
                label = ("dlfast" if fused else "PyTorch") + mode
                add_block(problem, label, fused, ours if fused else plain, x, channels_last, compiled)
        yield problem


def check_equal(ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Nothing is timed that gives another result; differences are those of the order of summation."""
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def work_of(block: nn.Module, x: Tensor) -> dict[str, Work]:
    """As the dense formulas have it; the winner mask counts among the bytes."""
    assert isinstance(block, dlfast.nn.ConvReLUPool2d)
    with torch.no_grad():
        choice, output = choose(block, x), block(x)
    outputs = output.numel() * (output.element_size() + (1 if block.pool == "max" else 0))
    inputs = x.numel() * x.element_size() + block.weight.numel() * 4
    convolutions = 3 if x.requires_grad else 2
    return {
        "forward": Work(choice.flops, inputs + outputs),
        "forward + backward": Work(convolutions * choice.flops, convolutions * (inputs + outputs)),
    }


def add_block(
    problem: Problem, label: str, ours: bool, module: nn.Module, x: Tensor, channels_last: bool, compiled: bool
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
    add(problem, Variant(label, ours, calls, None if compiled else module, x))
