"""One level of a model as a graph: the forward of one module, its children as single nodes."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from dlfast.fusion.source import Entered, Findings, study

# Wrappers around a function that a graph would lose.
CONTEXTS = ("utils/_contextlib.py", "amp/autocast_mode.py", "utils/checkpoint.py")


@dataclass
class Level:
    """The forward of one module in both modes, or why there is no trace of it."""

    name: str  # in the model; "" is the model itself
    module: nn.Module
    graphs: dict[bool, fx.Graph] = field(default_factory=dict)  # by module.training
    findings: Findings = field(default_factory=Findings)

    @property
    def why_not(self) -> str:
        return self.findings.not_traced

    def path(self, target: str) -> str:
        """The name in the model of what the graph calls `target`."""
        return f"{self.name}.{target}" if self.name else target


class _OneLevel(fx.Tracer):
    """Every child is a leaf; notes what a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and a not in self.tensor_attrs and not _is_of(self.root, a):
            self.frozen = "a tensor made in forward"
            return None  # the graph is looked at, not run
        return super().create_arg(a)


def _is_of(root: nn.Module, tensor: torch.Tensor) -> bool:
    return any(tensor is own for own in (*root.parameters(), *root.buffers()))


def trace(name: str, module: nn.Module) -> Level:
    """The level of `module`; never raises for what the user's code does."""
    level = Level(name, module)
    if "forward" in module.__dict__:
        level.findings.not_traced = "its forward was replaced on the instance"
        return level
    if hasattr(type(module).forward, "__wrapped__"):
        level.findings.not_traced = "its forward is decorated"
        return level
    entered: dict[Entered, None] = {}
    frozen = ""
    for training in (True, False):
        tracer = _OneLevel()
        try:
            with _unchanged(module), _in_mode(module, training), _recording(entered):
                level.graphs[training] = tracer.trace(module)
        except Exception as error:
            # Whatever the user's forward raises when its input is a stand-in: it has no trace.
            level.graphs.clear()
            text = " ".join(str(error).split())
            level.findings.not_traced = f"cannot be traced ({type(error).__name__}: {text[:160]})"
            return level
        finally:
            frozen = frozen or tracer.frozen
            vars(tracer).clear()  # its proxies would keep the model alive until the garbage is collected
    level.findings = study(module, [e for e in entered if not _is_known(e.scope.get("__name__", ""))])
    if any(e.code.co_filename.endswith(CONTEXTS) for e in entered):
        level.findings.not_traced = level.findings.not_traced or "runs under a context manager or checkpoint"
    if frozen:
        level.findings.not_rewritten = level.findings.not_rewritten or f"uses {frozen}"
    return level


def _is_known(module_name: str) -> bool:
    """Code of torch, of Python or ours: its branches do not depend on data, or fx knows that they do."""
    top = module_name.partition(".")[0]
    return top in ("torch", "dlfast") or top in sys.stdlib_module_names or top.startswith("namedtuple_")


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = module.training
    module.training = training
    try:
        yield
    finally:
        module.training = before


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Takes back what a forward writes to its module: there would be stand-ins in it."""
    before = dict(module.__dict__)
    contents = {name: copy.copy(value) for name, value in before.items() if isinstance(value, list | dict | set)}
    try:
        yield
    finally:
        module.__dict__.clear()
        module.__dict__.update(before)
        for name, value in contents.items():
            own = before[name]
            if len(own) != len(value) or any(x is not y for x, y in zip(own, value, strict=False)):
                own.clear()
                own.extend(value) if isinstance(own, list) else own.update(value)


@contextmanager
def _recording(entered: dict[Entered, None]) -> Iterator[None]:
    """Notes every Python function entered meanwhile."""

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered[Entered(frame.f_code, frame.f_globals)] = None

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # what it would run, finalisers of anybody's, is no part of the forward
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
