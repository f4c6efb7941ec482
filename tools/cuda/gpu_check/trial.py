"""A problem to time, with what failed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from dlfast.app.bench.problems import Problem, Variant


@dataclass
class Trial(Problem):
    """A problem some of whose variants may not run; those that do are timed all the same."""

    failures: list[str] = field(default_factory=list)
    captured: int = 0  # calls in a CUDA graph that is timed in their place; 0: the calls themselves are


Makers = dict[str, Callable[[], Iterator[Trial]]]
"""The items of a verb: each is made, and compiled, only when its turn comes."""


def of_problem(problem: Problem, calls: int, captured: int = 0) -> Trial:
    """`problem` with `calls` of it timed as one."""
    return Trial(**{**vars(problem), "calls": calls}, captured=captured)


def add(trial: Trial, name: str, ours: bool, make: Callable[[], Variant]) -> None:
    """Make a variant and call it. Where it fails, one of ours is a failure; of PyTorch, what it cannot do is a note."""
    try:
        variant = make()
        for call in variant.calls.values():
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        said = f"{name} fails: {summary(error)}"
        trial.notes.append(said)
        if ours:
            trial.failures.append(f"{trial.name}, {said}")
    else:
        trial.variants.append(variant)


def summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def use_tf32(wanted: bool) -> None:
    """Whether products of float32 are those of TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
