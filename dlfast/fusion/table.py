"""What fusing a model does, or would do, as a table."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from torch import nn

from dlfast.fusion.api import as_inputs, check_model, is_fused, look, unfuse
from dlfast.fusion.chain import Chain
from dlfast.fusion.survey import Survey
from dlfast.ran import Ran, ran_lines

HEADINGS = ("layer", "chain", "how it runs", "saved for backward", "predicted gain")


@dataclass(frozen=True)
class FusionReport:
    """The chains of a model: those that fuse, those that do not, and the forwards that could not be followed.

    Attributes:
        model: name of the model's class.
        fused: whether it was fused already.
        chains: the chains that fuse, in the order of the model.
        refused: what looks like a chain and is left alone, each with its reason.
        untraced: names of modules whose forward could not be followed, with the reason.
        why_not: why nothing at all is fused, or "".
        ran: with ``explain(..., ran=True)``, what of our operators ran.
    """

    model: str
    fused: bool
    chains: tuple[Chain, ...]
    refused: tuple[tuple[str, str, str], ...]
    untraced: tuple[tuple[str, str], ...]
    why_not: str
    ran: tuple[Ran, ...] | None = None

    @property
    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """One for each chain that fuses, as `HEADINGS` says."""
        return [
            (chain.name, chain.describe(), _how(chain), _megabytes(chain.bytes_saved), _gain(chain))
            for chain in self.chains
        ]

    @property
    def bytes_saved(self) -> int | None:
        """Bytes less that backward keeps, of all chains; None without example inputs."""
        known = [chain.bytes_saved for chain in self.chains if chain.bytes_saved is not None]
        return sum(known) if known else None

    @property
    def summary(self) -> str:
        """One line."""
        if self.why_not:
            return f"{self.model}: nothing is fused: {self.why_not}"
        verb = "are fused" if self.fused else "can be fused"
        saved = f", {_megabytes(self.bytes_saved)} less kept for backward" if self.bytes_saved else ""
        return f"{self.model}: {len(self.chains)} chains {verb}, {len(self.refused)} left alone{saved}"

    def notes(self) -> list[str]:
        """What is left alone, and chains that could not be longer; layers with the same reason on one line."""
        grouped: dict[str, list[str]] = {}
        for name, chain, why_not in self.refused:
            grouped.setdefault(why_not, []).append(f"{name} ({chain})")
        lines = [f"left alone: {_some(names)}: {why_not}" for why_not, names in grouped.items()]
        ended: dict[str, list[str]] = {}
        for fused in self.chains:
            if fused.stop and fused.window.pool is None:
                ended.setdefault(fused.stop, []).append(f"{fused.name} ({fused.describe()})")
        lines += [f"no longer: {_some(names)}: {why_not}" for why_not, names in ended.items()]
        unseen: dict[str, list[str]] = {}
        for name, why_not in self.untraced:
            unseen.setdefault(why_not, []).append(name or "the model's forward")
        lines += [f"not followed: {_some(names)}: {why_not}" for why_not, names in unseen.items()]
        return lines if self.ran is None else [*lines, *ran_lines(self.ran)]

    def __str__(self) -> str:
        rows = [HEADINGS, *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.summary, *(lines if self.chains else []), *self.notes()])


def report(model: nn.Module, *inputs: Any) -> FusionReport:
    """The report of `model`, with the algorithms for `inputs` where there are any; nothing is changed."""
    check_model("explain", model)
    fused = is_fused(model)
    found = look(unfuse(model), as_inputs(inputs) or None)
    return of_survey(found, model, fused)


def of_survey(found: Survey, model: nn.Module, fused: bool = False) -> FusionReport:
    """A survey as a report."""
    return FusionReport(
        type(model).__name__,
        fused,
        tuple(found.fused),
        tuple(
            (chain.name, chain.describe() or type(chain.head.module).__name__, chain.why_not) for chain in found.refused
        ),
        tuple((level.name, level.why_not) for level in found.untraced),
        found.why_not,
    )


def print_report(shown: FusionReport) -> None:
    """As a table of rich where it is installed."""
    if importlib.util.find_spec("rich") is None or not shown.chains:
        print(shown)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=shown.summary)
    for heading in HEADINGS:
        table.add_column(heading)
    for row in shown.rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in shown.notes():
        console.print(note, markup=False)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _how(chain: Chain) -> str:
    if chain.kind != "conv":
        return "one pass"
    c = chain.choice
    how = "one operator" if c is None else f"{c.forward}, backward {c.grad_input} and {c.grad_weight}"
    return how if chain.bn is None else f"{how}; one pass after it, in evaluation folded into it"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f} MB"


def _gain(chain: Chain) -> str:
    gain = "" if chain.choice is None else f"{chain.choice.predicted_gain:.2f}x"
    host = f"{chain.host_seconds * 1e3:.2f} ms more of the host" if chain.host_seconds else ""
    return ", ".join(part for part in (gain, host) if part)
