"""What ran: how often each algorithm of each operator has finished a part of its work in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dlfast._native import native


class Ran(NamedTuple):
    """An algorithm, and how often it has run.

    Attributes:
        operator: "conv_relu_pool2d", "relu_pool2d" or "batch_norm_relu_pool2d".
        device: "cpu" or "cuda".
        part: "forward", "backward" or, of a convolution, "grad_input" and "grad_weight".
        algorithm: as :func:`dlfast.explain` names it; "pass" of an operator that has one only.
        calls: how often.
    """

    operator: str
    device: str
    part: str
    algorithm: str
    calls: int


def counts() -> list[Ran]:
    """Since the start of the process; empty without compiled operators.

    >>> all(ran.calls > 0 for ran in counts())
    True
    """
    return [] if native.module is None else [Ran(*row) for row in native.module.ran()]


@contextmanager
def watch() -> Iterator[list[Ran]]:
    """What runs inside, listed when it is left. Whatever runs meanwhile in other threads counts as well.

    >>> import torch, dlfast
    >>> with watch() as ran:
    ...     y = dlfast.nn.ConvReLUPool2d(3, 8, 3)(torch.randn(2, 3, 16, 16))
    >>> {each.part for each in ran} <= {"forward"}
    True
    """
    before = {ran[:4]: ran.calls for ran in counts()}
    seen: list[Ran] = []
    yield seen
    for ran in counts():
        if more := ran.calls - before.get(ran[:4], 0):
            seen.append(ran._replace(calls=more))


def ran_lines(ran: Iterable[Ran]) -> list[str]:
    """For people."""
    lines = [f"ran: {r.operator} {r.part}: {r.algorithm} on {r.device}, {r.calls}x" for r in ran]
    return lines or ["ran: none of our operators"]
