"""What generated code has taken for granted of a module, looked at before each call of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dlfast.fusion.layers import layer_at
from dlfast.fusion.source import MISSING, Findings, value_at
from dlfast.fusion.tracing import Level

LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass
class Guard:
    """What a trace of a module's forward has frozen, each by its path from the module.

    Attributes:
        flags: attributes and the values that decided, or were taken in as numbers.
        globals: global variables that were taken in, by the name of their Python module.
        methods: names of methods of the class that the forward has entered.
        keys: the children of containers that the forward goes through, in their order.
        aliases: layers that have several names, of which the trace knows one.
    """

    flags: dict[tuple[str, ...], Any] = field(default_factory=dict)
    globals: dict[tuple[str, str], Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    keys: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    aliases: list[tuple[tuple[str, ...], nn.Module]] = field(default_factory=list)

    @classmethod
    def of(cls, level: Level) -> Guard:
        """Of all that the traces of `level` have taken in."""
        module, findings = level.module, level.findings
        flags = {tuple(path.split(".")): value for path, value in {**findings.constants, **findings.flags}.items()}
        nodes = [node for graph in level.graphs.values() for node in graph.nodes]
        called = {str(node.target) for node in nodes if node.op == "call_module"}
        return cls(
            flags, dict(findings.globals), tuple(sorted({"forward", *findings.methods})),
            _containers(module, called, findings), _aliases(module, called),
        )  # fmt: skip

    def __post_init__(self) -> None:
        self._functions: dict[str, Any] = {}

    def bind(self, module: nn.Module) -> None:
        """Take the methods that `module` has now as those that were traced."""
        self._functions = {name: getattr(type(module), name, MISSING) for name in self.methods}

    def change(self, module: nn.Module) -> str:
        """What is no longer so; empty where all is."""
        name = type(module).__name__
        for path, value in self.flags.items():
            now = value_at(module, path)
            if now is not value and now != value:
                return f"{name}.{'.'.join(path)} was {value!r} and is {now!r} now"
        kind, own = type(module), module.__dict__
        for method, function in self._functions.items():
            if getattr(kind, method, MISSING) is not function or (method != "forward" and method in own):
                return f"{name}.{method} was replaced"
        for path, keys in self.keys.items():
            container = layer_at(module, path)
            if container is None or list(container._modules) != keys:
                return f"the children of {'.'.join((name, *path))} are others now"
        for path, layer in self.aliases:
            if layer_at(module, path) is not layer:
                return f"{'.'.join((name, *path))} is another layer now"
        for (owner, variable), value in self.globals.items():
            now = getattr(sys.modules.get(owner), variable, MISSING)
            if now is not value and now != value:
                return f"the global variable {variable} was {value!r} and is {now!r} now"
        return ""

    def flags_hold(self, module: nn.Module) -> bool:
        """The part of `change` that ``torch.compile`` can follow, so that it compiles anew when a flag changes."""
        return all(value_at(module, path) == value for path, value in self.flags.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functions": {}}


def _containers(module: nn.Module, called: set[str], findings: Findings) -> dict[tuple[str, ...], list[str]]:
    """The module itself, where its forward runs its children one after the other, and the lists in it."""
    found: dict[tuple[str, ...], list[str]] = {}
    if isinstance(module, nn.Sequential) or findings.walks:
        found[()] = list(module._modules)
    reached = {tuple(target.split(".")[:length]) for target in called for length in range(1, target.count(".") + 1)}
    for path, child in module.named_modules():
        parts = tuple(path.split("."))
        if path and (parts in reached or (isinstance(child, LISTS) and _only_lists(module, parts[:-1]))):
            found[parts] = list(child._modules)
    return found


def _only_lists(module: nn.Module, path: tuple[str, ...]) -> bool:
    """Whether everything on the way to the end of `path` is a list, which a forward may go through."""
    return all(isinstance(layer_at(module, path[: length + 1]), LISTS) for length in range(len(path)))


def _aliases(module: nn.Module, called: set[str]) -> list[tuple[tuple[str, ...], nn.Module]]:
    names: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        names.setdefault(id(child), []).append(path)
    found = []
    for target in sorted(called):
        layer = module.get_submodule(target)
        mine = names.get(id(layer), [])
        found += [(tuple(path.split(".")), layer) for path in mine if len(mine) > 1]
    return found
