"""Which modules are only ever called as a whole, so that what they do inside is their own affair.

A chain in a ``Sequential`` may be replaced only if nobody runs its layers one by one: a wrapper that walks
through ``vgg.features`` and keeps what some layers give would see something else.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator

from torch import fx, nn

from dlfast.fusion.tracing import Level

# Methods that run a model: what they use, and the methods that they call, counts.
ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")
WALKS = {"children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}


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
    parts = target.split(".")[:-1]
    for length in range(1, len(parts) + 1):
        module = root.get_submodule(".".join(parts[:length]))
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield module


def _used_otherwise(module: nn.Module) -> list[nn.Module]:
    """Children of a module without a trace that its source does not merely call.

    ``self.block(x)``, and ``for block in self.blocks: x = block(x)``, are calls.
    """
    children = dict(module.named_children())
    functions = _functions(type(module))
    if functions is None:
        return list(children.values())
    used: dict[str, nn.Module] = {}
    for function in functions:
        called = _calls_in(function)
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute) or not _is_self(node.value):
                continue
            if node.attr in WALKS:
                return list(children.values())
            if node.attr in children and id(node) not in called:
                used[node.attr] = children[node.attr]
        if any(isinstance(n, ast.Name) and n.id in ("getattr", "vars") for n in ast.walk(function)):
            return list(children.values())
    return list(used.values())


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _calls_in(function: ast.AST) -> set[int]:
    """The ids of the nodes ``self.x`` that are called, alone or one element after the other."""
    found: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            func = node.func
            if isinstance(func, ast.Subscript):  # self.blocks[i](x)
                func = func.value
            found.add(id(func))
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            source = node.iter
            if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and len(source.args) == 1:
                source = source.args[0]  # reversed(self.blocks)
            uses = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == node.target.id]
            plain = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
            if all(id(use) in plain or use is node.target for use in uses):
                found.add(id(source))
    return found


def _functions(kind: type[nn.Module]) -> list[ast.AST] | None:
    """The source of the methods that run a module, and of those they call; None where there is none."""
    found: dict[str, ast.AST] = {}
    waiting = [name for name in ENTRIES if name in _methods(kind)]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        function = getattr(kind, name)
        if (getattr(function, "__module__", "") or "").partition(".")[0] in ("torch", "pytorch_lightning", "lightning"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError):
            return None
        found[name] = tree
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_self(node.value) and node.attr in _methods(kind):
                waiting.append(node.attr)
    return list(found.values())


def _methods(kind: type[nn.Module]) -> set[str]:
    own = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    return {name for base in own for name, value in vars(base).items() if inspect.isfunction(value)}
