"""Steps of optimizers over the parameters of networks, and what a step, a block and a chain cost the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from dlfast.app.bench import optim, overhead, peers
from dlfast.app.bench.problems import Problem
from tools.cuda.gpu_check.trial import Makers, Trial, of_problem

CALLS = 10  # between two looks at the clock: one alone would be measured with its launch


def makers(device: str) -> Makers:
    found: dict[str, Callable[[], Iterator[Problem]]] = {}
    for name in optim.LISTS:
        found[f"optimizers, {name}"] = functools.partial(optim.problems, [f"optim-{name}"], device)
        if peers.installed(device):
            found[f"other libraries, {name}"] = functools.partial(peers.problems, [name], device)
    found["overhead"] = functools.partial(overhead.problems, device)
    return {name: functools.partial(trials, problems) for name, problems in found.items()}


def trials(problems: Callable[[], Iterator[Problem]]) -> Iterator[Trial]:
    for problem in problems():
        yield of_problem(problem, max(problem.calls, CALLS))
