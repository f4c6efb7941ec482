"""What the planner chose for a convolution block, and what it expects of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dlfast._native import native, runs_on
from dlfast.functional import conv_relu_pool2d
from dlfast.functional.arguments import pair, same_padding
from dlfast.nn import ConvReLUPool2d

# What each name means, for people.
PATHS = {
    "eager": "PyTorch's kernels, one by one",
    "pytorch": "PyTorch's convolution and one pass",
    "direct": "fused convolution",
    "winograd2": "fused Winograd F(2x2, 3x3)",
    "winograd4": "fused Winograd F(4x4, 3x3)",
    "sparse": "only what passes gradient",
    "rows": "only what passes gradient, few channels",
    "masked": "few channels, the gradient masked by who won",
    "depthwise": "depthwise convolution",
    "single": "one fused kernel",
    "reference": "plain PyTorch",
}


@dataclass(frozen=True)
class Speed:
    """What this machine reaches with torch's current number of threads: the two lines of the roofline."""

    flops: float  # float32 multiplications and additions per second
    bandwidth: float  # bytes read and written per second


@dataclass(frozen=True)
class Candidate:
    """One way to compute a part of a block; seconds are predicted, or measured with ``cudnn.benchmark``."""

    path: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Part:
    """forward, grad_input or grad_weight (with grad_bias) of a block."""

    name: str
    chosen: Candidate
    candidates: tuple[Candidate, ...]  # PyTorch's first

    @property
    def gain(self) -> float:
        """Predicted time of PyTorch's way over that of the chosen one."""
        return self.candidates[0].seconds / self.chosen.seconds


@dataclass(frozen=True)
class Plan:
    """The ways chosen for a block at one input shape. ``print`` it for a table.

    Attributes:
        forward, grad_input, grad_weight: names of the chosen ways: "pytorch" (PyTorch's kernels with one pass
            of ours), "direct", "winograd2", "winograd4", "sparse", "rows", "masked", "depthwise", on CUDA "single",
            or "reference" where compiled operators do not run at all. On CUDA "eager" stands among the predicted
            candidates for comparison. With `torch.backends.cudnn.benchmark` whole blocks are measured, and it is the
            name of all three where PyTorch's kernels, one by one, were faster.
        reason: why, in a sentence.
        predicted_gain: time of PyTorch's way over the chosen one, forward and the gradients that are needed;
            measured where the block was.
        flops: multiplications and additions of one convolution; forward and each gradient have as many.
        bytes: what the forward reads and writes.
        parts: the candidates of each part with their predicted seconds.
        floor: seconds that the forward takes at least if every product is computed and every byte moved once.
    """

    forward: str
    grad_input: str
    grad_weight: str
    reason: str
    predicted_gain: float
    flops: int
    bytes: int
    parts: tuple[Part, ...]
    floor: float

    def __str__(self) -> str:
        lines = [f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB"]
        if self.parts:
            lines[0] += f", roofline {self.floor * 1e3:.3g} ms"
        for part in self.parts:
            lines.append(f"{part.name}: {PATHS[part.chosen.path]}")
            for c in part.candidates:
                mark = "*" if c is part.chosen else " "
                lines.append(f"  {mark} {c.path:<10} {c.seconds * 1e3:8.3f} ms {c.bytes / 1e6:8.2f} MB")
        lines.append(f"predicted gain {self.predicted_gain:.2f}x: {self.reason}")
        return "\n".join(lines)


def machine_speed() -> Speed:
    """Measured once per number of threads; takes about a tenth of a second.

    Raises:
        RuntimeError: the compiled operators are not available.

    >>> from dlfast._native import native
    >>> native.module is None or machine_speed().flops > 1e8
    True
    """
    return _measured(torch.get_num_threads())


@functools.cache
def _measured(threads: int) -> Speed:
    if native.module is None:
        raise RuntimeError(f"machine_speed needs the compiled operators ({native.reason})")
    return Speed(native.module.peak_flops(), native.module.peak_bandwidth())


def plan_block(module: ConvReLUPool2d, input: Tensor) -> Plan:
    """The plan of `module` for `input`, nothing being computed.

    Args:
        module: a convolution block of `dlfast.nn`.
        input: (N, C, H, W) or (C, H, W); only its shape, strides, dtype and device count, and ``requires_grad``:
            without it grad_input is not needed.

    Raises:
        RuntimeError: `input` does not fit `module`.

    >>> import torch, dlfast
    >>> block = dlfast.nn.ConvReLUPool2d(64, 64, 3, padding=1)
    >>> plan = plan_block(block, torch.empty(8, 64, 32, 32))
    >>> plan.flops == 2 * 8 * 64 * 32 * 32 * 64 * 9
    True
    """
    if native.module is None or not runs_on(input.device):
        where = native.reason or f"no compiled operators for {input.device}"
        return _reference_plan(module, input, where)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    padding = module.padding
    if module.padding_mode != "zeros":
        batched = torch.nn.functional.pad(batched, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = (0, 0)
    elif isinstance(padding, str):
        padding = same_padding(module.kernel_size, module.dilation)[0] if padding == "same" else (0, 0)
    training = torch.is_grad_enabled()
    rows = native.module.plan_block(
        batched, module.weight, module.bias, module.stride, pair("padding", padding), module.dilation, module.groups,
        module.activation, module.pool, module.pool_size, module.pool_stride, module.pool_padding,
        module.ceil_mode, training,
    )  # fmt: skip
    return _plan_from(rows, training, input)


Row = tuple[str, str, float, float, float, bool]  # part, path, flops, bytes, seconds on CUDA, chosen


def _plan_from(rows: list[Row], training: bool, input: Tensor) -> Plan:
    flops, floor = int(rows[0][2]), rows[0][4]
    speed = None if floor > 0 else machine_speed()

    def seconds(flops: float, moved: float, known: float) -> float:
        return known if speed is None else flops / speed.flops + moved / speed.bandwidth

    parts = []
    for name in ("forward", "grad_input", "grad_weight"):
        mine = [row for row in rows if row[0] == name]
        candidates = tuple(Candidate(path, seconds(f, b, known), int(b)) for _, path, f, b, known, _ in mine)
        chosen = next(c for c, row in zip(candidates, mine, strict=True) if row[-1])
        parts.append(Part(name, chosen, candidates))
    needed = [parts[0]]
    if training:
        needed += [parts[2], *([parts[1]] if input.requires_grad else [])]
    gain = sum(p.candidates[0].seconds for p in needed) / sum(p.chosen.seconds for p in needed)
    if speed is not None:
        floor = max(flops / speed.flops, min(c.bytes for c in parts[0].candidates) / speed.bandwidth)
    paths, reason = [part.chosen.path for part in parts], _reason(needed)
    whole = {path: known for part, path, _, _, known, _ in rows if part == "block"}
    if whole:
        eager, ours = whole["eager"], whole["operator"]
        gain = max(1.0, eager / ours)
        if eager < ours:
            paths, reason = ["eager"] * 3, "PyTorch's kernels"
        reason += f"; measured as a whole: {eager * 1e3:.3g} ms by PyTorch's kernels, {ours * 1e3:.3g} ms by ours"
    forward, grad_input, grad_weight = paths
    moved = parts[0].chosen.bytes
    return Plan(forward, grad_input, grad_weight, reason, gain, flops, moved, tuple(needed), floor)


def _reason(parts: list[Part]) -> str:
    ours = [part for part in parts if part.chosen.path != "pytorch"]
    if not ours:
        others = [c.path for part in parts for c in part.candidates if c.path not in ("eager", "pytorch")]
        return "PyTorch's kernels are faster here" if others else "our kernels do not take this problem"
    return ", ".join(f"{part.name} {part.chosen.path} ({part.gain:.1f}x)" for part in ours)


def _reference_plan(module: ConvReLUPool2d, input: Tensor, reason: str) -> Plan:
    with torch.no_grad():
        output = conv_relu_pool2d(
            input.to("meta"), module.weight.to("meta"), stride=module.stride, padding=module.padding,
            dilation=module.dilation, groups=module.groups, pool=None,
        )  # fmt: skip
    flops = 2 * output.numel() * module.weight[0].numel()
    moved = (input.numel() + module.weight.numel() + 2 * output.numel()) * input.element_size()
    return Plan("reference", "reference", "reference", reason, 1.0, flops, moved, (), 0.0)
