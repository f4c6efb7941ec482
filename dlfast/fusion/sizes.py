"""Sizes of what layers give."""

from __future__ import annotations

import torch
from torch import nn


def ordinary(size: tuple[int | None, int | None], input: tuple[int, ...]) -> tuple[int, int] | None:
    """The window, and stride, of an adaptive pooling that divides its input evenly.

    >>> ordinary((1, None), (6, 6)), ordinary((4, 4), (6, 6))
    ((6, 1), None)
    """
    wanted = [have if want is None else want for want, have in zip(size, input, strict=True)]
    if any(want < 1 or have % want for want, have in zip(wanted, input, strict=True)):
        return None
    return input[0] // wanted[0], input[1] // wanted[1]


def convolved(conv: nn.Conv2d, shape: torch.Size) -> list[int]:
    """The shape of what `conv` makes of an input of `shape`."""
    size = []
    for axis in (0, 1):
        reach = conv.dilation[axis] * (conv.weight.shape[2 + axis] - 1)
        padding = {"valid": 0, "same": reach}[conv.padding] if isinstance(conv.padding, str) else 2 * conv.padding[axis]
        size.append((shape[axis - 2] + padding - reach - 1) // conv.stride[axis] + 1)
    return [*shape[:-3], conv.weight.shape[0], *size]
