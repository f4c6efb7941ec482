"""Which modules are only ever called as a whole, so that what they do inside is their own affair.

A chain in a ``Sequential`` may be replaced only if nobody runs its layers one by one: a wrapper that walks
through ``vgg.features`` and keeps what some layers give would see something else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx, nn

from dlfast.fusion.methods import WALKS, Uses, is_named, note_uses, running, self_name
from dlfast.fusion.tracing import Level, place_of


def uses_of(levels: Iterable[Level]) -> Uses:
    """What the methods do that the traces did not enter, of the modules with a trace and of those without."""
    uses = Uses()
    for level in levels:
        known = set(level.entered)
        if level.why_not:  # `exposed` reads what runs these
            known |= {place_of(function.__code__) for function, _ in running(type(level.module))}
        note_uses(level.module, lambda code, known=known: place_of(code) in known, uses)  # type: ignore[misc]
    return uses


def called_by_traces_alone(model: nn.Module, levels: Iterable[Level]) -> set[int]:
    """The ids of the modules all of whose parents have a trace, so that all of their calls are known."""
    traced = {id(level.module) for level in levels if not level.why_not}
    parents: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for child in module.children():
            parents.setdefault(id(child), []).append(module)

    def known(parent: nn.Module) -> bool:
        if isinstance(parent, nn.ModuleList | nn.ModuleDict):  # have no forward: whoever holds them calls
            return all(known(owner) for owner in parents.get(id(parent), []))
        return id(parent) in traced

    return {key for key, owners in parents.items() if all(known(owner) for owner in owners)}


def exposed(root: nn.Module, levels: Iterable[Level]) -> set[int]:
    """The ids of the modules in `root` whose children somebody else than themselves may call."""
    found: set[int] = set()
    for level in levels:
        if level.why_not:
            for child in _used_otherwise(level.module):
                found.update(id(module) for module in child.modules())
            continue
        for graph in level.graphs.values():
            for node in graph.nodes:
                if node.op == "call_module":
                    found.update(id(module) for module in _between(level.module, str(node.target)))
    return found


def calls(levels: Iterable[Level]) -> dict[int, dict[str, int]]:
    """How often each module is called: by its id, and by the level that calls it; the mode with more counts."""
    counted: dict[int, dict[str, int]] = {}
    for level in levels:
        for graph in level.graphs.values():
            here: dict[int, int] = {}
            for node in graph.nodes:
                if node.op == "call_module":
                    module = level.module.get_submodule(str(node.target))
                    here[id(module)] = here.get(id(module), 0) + 1
            for key, count in here.items():
                of_module = counted.setdefault(key, {})
                of_module[level.name] = max(of_module.get(level.name, 0), count)
    return counted


def call_nodes(graph: fx.Graph, root: nn.Module, module: nn.Module) -> list[fx.Node]:
    """Where a graph traced from `root` calls `module`."""
    return [n for n in graph.nodes if n.op == "call_module" and root.get_submodule(str(n.target)) is module]


def _between(root: nn.Module, target: str) -> Iterator[nn.Module]:
    """The modules that a call of "a.b.c" reaches through: a and a.b. Lists have no forward of their own."""
    if root.get_submodule(target) in root.children():  # a trace knows a layer by one of its names
        return
    parts = target.split(".")[:-1]
    for length in range(1, len(parts) + 1):
        module = root.get_submodule(".".join(parts[:length]))
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield module


def _used_otherwise(module: nn.Module) -> list[nn.Module]:
    """Modules of a module without a trace that its source does not merely call.

    ``self.block(x)``, and ``for block in self.blocks: x = block(x)`` of a ``ModuleList``, are calls.
    """
    children = dict(module.named_children())
    held = [value for name, value in vars(module).items() if name != "_modules"]
    used = {id(each): each for each in in_containers(held)}
    for _, function in running(type(module)):
        if function is None:
            return list(children.values())
        called, elements = _calls_in(function)
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute) or not is_named(node.value, self_name(function)):
                continue
            if node.attr in WALKS:
                return list(children.values())
            child = children.get(node.attr)
            if child is None or id(node) in called:
                continue
            if id(node) not in elements or not isinstance(child, nn.ModuleList | nn.ModuleDict):
                used[id(child)] = child
        if any(isinstance(n, ast.Name) and n.id in ("getattr", "vars") for n in ast.walk(function)):
            return list(children.values())
    return list(used.values())


def in_containers(value: Any) -> Iterator[nn.Module]:
    """The modules in a list, tuple or dict: `self.layers = [self.conv, self.relu]`, which is no child."""
    if isinstance(value, list | tuple | set):
        for item in value:
            yield from [item] if isinstance(item, nn.Module) else in_containers(item)
    elif type(value) is dict:
        yield from in_containers(list(value.values()))


def _calls_in(function: ast.AST) -> tuple[set[int], set[int]]:
    """The ids of the nodes ``self.x`` that are called, and of those whose elements are called one after the other."""
    whole: set[int] = set()
    elements: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Subscript):  # self.blocks[i](x)
                elements.add(id(node.func.value))
            else:
                whole.add(id(node.func))
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            source = node.iter
            if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and len(source.args) == 1:
                source = source.args[0]  # reversed(self.blocks)
            uses = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == node.target.id]
            plain = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
            if all(id(use) in plain or use is node.target for use in uses):
                elements.add(id(source))
    return whole, elements
