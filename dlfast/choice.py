"""Which algorithms were chosen for a convolution block, why, and what is expected of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlfast._native import native, runs_on
from dlfast.functional import conv_relu_pool2d
from dlfast.functional.arguments import pair, same_padding
from dlfast.nn import ConvReLUPool2d
from dlfast.ran import Ran, ran_lines

# What each algorithm is, for people.
ALGORITHMS = {
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
FASTER = "PyTorch's kernels are faster here"
MEASURED = "measured"


@dataclass(frozen=True)
class Speed:
    """What this machine reaches with torch's current number of threads: the two lines of the roofline."""

    flops: float  # float32 multiplications and additions per second
    bandwidth: float  # bytes read and written per second


@dataclass(frozen=True)
class Candidate:
    """An algorithm for a part of a block; seconds are predicted, or measured with ``cudnn.benchmark``."""

    algorithm: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Part:
    """forward, grad_input or grad_weight (with grad_bias) of a block."""

    name: str
    chosen: Candidate
    candidates: tuple[Candidate, ...]  # PyTorch's first
    reason: str  # for the choice, in a few words

    @property
    def gain(self) -> float:
        """Predicted time of PyTorch's kernels over that of the chosen algorithm."""
        return self.candidates[0].seconds / self.chosen.seconds


@dataclass(frozen=True)
class BlockChoice:
    """The algorithms chosen for a block at one input shape. ``print`` it for a table.

    Attributes:
        forward, grad_input, grad_weight: names of the chosen algorithms: "pytorch" (PyTorch's kernels with one pass
            of ours), "direct", "winograd2", "winograd4", "sparse", "rows", "masked", "depthwise", on CUDA "single",
            or "reference" where compiled operators do not run at all. On CUDA "eager" stands among the predicted
            candidates for comparison. With `torch.backends.cudnn.benchmark` whole blocks are measured, and it is the
            name of all three where PyTorch's kernels, one by one, were faster.
        reason: why, in a sentence; on CUDA also what the predictions rest on.
        predicted_gain: time of PyTorch's kernels over the chosen ones, forward and the gradients that are needed;
            measured where the block was.
        flops: multiplications and additions of one convolution; forward and each gradient have as many.
        bytes: what the forward reads and writes.
        parts: the candidates of each part with their predicted seconds.
        floor: seconds that the forward takes at least if every product is computed and every byte moved once.
        ran: with ``explain(..., ran=True)``, what ran: (operator, device, part, algorithm, calls).
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
    ran: tuple[Ran, ...] | None = None

    @property
    def seconds_saved(self) -> float:
        """By the chosen algorithms, in the forward and the gradients that are needed; below 0 where they lose."""
        return self.eager_seconds - self.eager_seconds / self.predicted_gain

    @property
    def eager_seconds(self) -> float:
        """Of PyTorch's kernels, in the same parts."""
        return sum(part.chosen.seconds for part in self.parts) * self.predicted_gain

    def __str__(self) -> str:
        lines = [f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB"]
        if self.parts:
            lines[0] += f", roofline {self.floor * 1e3:.3g} ms"
        for part in self.parts:
            lines.append(f"{part.name}: {ALGORITHMS[part.chosen.algorithm]}")
            for c in part.candidates:
                mark = "*" if c is part.chosen else " "
                lines.append(f"  {mark} {c.algorithm:<10} {c.seconds * 1e3:8.3f} ms {c.bytes / 1e6:8.2f} MB")
        lines.append(f"predicted gain {self.predicted_gain:.2f}x: {self.reason}")
        if self.ran is not None:
            lines += ran_lines(self.ran)
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


def choose(module: ConvReLUPool2d, input: Tensor) -> BlockChoice:
    """What is chosen for `module` and `input`, nothing being computed.

    Args:
        module: a convolution block of `dlfast.nn`.
        input: (N, C, H, W) or (C, H, W); only its shape, strides, dtype and device count, and ``requires_grad``:
            without it grad_input is not needed.

    Raises:
        RuntimeError: `input` does not fit `module`.

    >>> import torch, dlfast
    >>> block = dlfast.nn.ConvReLUPool2d(64, 64, 3, padding=1)
    >>> choice = choose(block, torch.empty(8, 64, 32, 32))
    >>> choice.flops == 2 * 8 * 64 * 32 * 32 * 64 * 9
    True
    """
    if native.module is None or not runs_on(input.device):
        where = native.reason or f"no compiled operators for {input.device}"
        return _reference_choice(module, input, where)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    padding = module.padding
    if module.padding_mode != "zeros":
        batched = torch.nn.functional.pad(batched, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = (0, 0)
    elif isinstance(padding, str):
        padding = same_padding(module.kernel_size, module.dilation)[0] if padding == "same" else (0, 0)
    training = torch.is_grad_enabled()
    speed = machine_speed() if input.device.type == "cpu" else Speed(1.0, 1.0)
    report = native.module.report_block(
        input=batched, weight=module.weight, bias=module.bias, stride=module.stride, padding=pair("padding", padding),
        dilation=module.dilation, groups=module.groups, activation=module.activation, pool=module.pool,
        pool_size=module.pool_size, pool_stride=module.pool_stride, pool_padding=module.pool_padding,
        ceil_mode=module.ceil_mode, save_winner_mask=training, flops=speed.flops, bandwidth=speed.bandwidth,
    )  # fmt: skip
    return _from_report(report, training, input.requires_grad)


def _from_report(report: Any, training: bool, needs_input: bool) -> BlockChoice:
    parts = []
    for name in ("forward", "grad_input", "grad_weight"):
        choice = getattr(report, name)
        candidates = tuple(Candidate(c.algorithm, c.seconds, int(c.bytes)) for c in choice.candidates)
        parts.append(Part(name, candidates[choice.best], candidates, choice.reason))
    needed = [parts[0]]
    if training:
        needed += [parts[2], *([parts[1]] if needs_input else [])]
    chosen = sum(p.chosen.seconds for p in needed)
    gain = sum(p.candidates[0].seconds for p in needed) / chosen if chosen else 1.0
    algorithms, reason = [part.chosen.algorithm for part in parts], _reason(needed)
    eager, ours = report.measured_eager, report.measured_ours
    if eager is not None:
        gain = max(1.0, eager / ours)
        if eager < ours:
            algorithms, reason = ["eager"] * 3, "PyTorch's kernels"
        reason += f"; measured as a whole: {eager * 1e3:.3g} ms by PyTorch's kernels, {ours * 1e3:.3g} ms by ours"
    elif report.basis and all(part.reason != MEASURED for part in needed):
        reason += f"; {report.basis}"
    forward, grad_input, grad_weight = algorithms
    moved = parts[0].chosen.bytes
    return BlockChoice(
        forward, grad_input, grad_weight, reason, gain, int(report.flops), moved, tuple(needed), report.floor
    )


def _reason(parts: list[Part]) -> str:
    ours = [part for part in parts if part.chosen.algorithm != "pytorch"]
    if ours:
        return ", ".join(f"{part.name} {part.chosen.algorithm} ({part.gain:.1f}x)" for part in ours)
    reasons = list(dict.fromkeys(part.reason for part in parts))
    return FASTER if FASTER in reasons else reasons[0]


def _reference_choice(module: ConvReLUPool2d, input: Tensor, reason: str) -> BlockChoice:
    with torch.no_grad():
        output = conv_relu_pool2d(
            input.to("meta"), module.weight.to("meta"), stride=module.stride, padding=module.padding,
            dilation=module.dilation, groups=module.groups, pool=None,
        )  # fmt: skip
    flops = 2 * output.numel() * module.weight[0].numel()
    moved = (input.numel() + module.weight.numel() + 2 * output.numel()) * input.element_size()
    return BlockChoice("reference", "reference", "reference", reason, 1.0, flops, moved, (), 0.0)
