"""What the operators take: sizes as an int or a pair, padding by name."""

from __future__ import annotations

from collections.abc import Sequence

Size2 = int | Sequence[int]
Sizes = list[int]  # as the compiled operators have them


def pair(name: str, value: Size2) -> tuple[int, int]:
    """`value` as (height, width); an int counts for both."""
    if isinstance(value, int):
        return (value, value)
    values = tuple(value)
    if len(values) == 1:
        return (values[0], values[0])
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    return (values[0], values[1])


def same_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], list[int] | None]:
    """The symmetric part of padding="same", and what `F.pad` must add first where a side needs one more.

    PyTorch puts the odd element at the end (bottom, right).
    """
    total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    low = (total[0] // 2, total[1] // 2)
    extra = [total[0] - 2 * low[0], total[1] - 2 * low[1]]
    return low, [0, extra[1], 0, extra[0]] if any(extra) else None
