"""What the methods of a module that its forward does not enter do with its layers.

`forward_intermediates` beside `forward`, or the `training_step` of a trainer's module, may run layers of a chain
one by one, and would meet a fused layer in place of the first and nothing in place of the others.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import nn

# Methods that run a model: what they use, and the methods that they call, counts.
ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")
WALKS = {"children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}
OTHERS = ("torch", "pytorch_lightning", "lightning")  # whose classes the user's modules are built on


@dataclass
class Uses:
    """By the ids of modules, the method that uses them."""

    called: dict[int, str] = field(default_factory=dict)  # a layer, by itself
    opened: dict[int, str] = field(default_factory=dict)  # the children of a module, one by one


def note_uses(module: nn.Module, skip: Callable[[CodeType], bool], uses: Uses) -> None:
    """Add to `uses` what the methods of `module` do whose code `skip` does not know."""
    for name, function in methods_of(type(module)).items():
        if name.startswith("__") and name != "__call__":
            continue
        if skip(function.__code__) or is_of_others(function):
            continue
        where = f"{type(module).__name__}.{name}"
        tree = source_of(function)
        if tree is None:  # whatever it names, it may call
            for child_name, child in module.named_children():
                if child_name in function.__code__.co_names:
                    uses.called.setdefault(id(child), where)
                    uses.opened.setdefault(id(child), where)
        else:
            _Method(module, tree, where, uses).note()


class _Method:
    """One method, read for calls of layers of its module."""

    def __init__(self, module: nn.Module, tree: ast.FunctionDef, where: str, uses: Uses) -> None:
        self.module, self.tree, self.where, self.uses = module, tree, where, uses
        self.self_name = self_name(tree)
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        self.runs_locals = any(isinstance(func, ast.Name) and func.id in stored for func in calls)

    def note(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                self._call(node)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
                self._elements(self._resolve(node.value))
            elif isinstance(node, ast.For | ast.comprehension) and self.runs_locals:
                for part in ast.walk(node.iter):
                    self._elements(self._resolve(part))

    def _call(self, node: ast.Call) -> None:
        func = node.func
        called = self._resolve(func)
        if called is not None and called is not self.module:
            self.uses.called.setdefault(id(called), self.where)
        elif isinstance(func, ast.Subscript):  # self.blocks[i](x)
            self._elements(self._resolve(func.value))
        elif isinstance(func, ast.Attribute) and func.attr in WALKS and self.runs_locals:
            owner = self._resolve(func.value)
            for module in () if owner is None else owner.modules():
                self._elements(module, any_kind=True)
        elif isinstance(func, ast.Name) and func.id == "getattr" and node.args:
            owner = self._resolve(node.args[0])
            direct = any(isinstance(n, ast.Call) and n.func is node for n in ast.walk(self.tree))
            if owner is not None and (direct or self.runs_locals):
                for child in owner.children():
                    self.uses.called.setdefault(id(child), self.where)

    def _elements(self, module: nn.Module | None, any_kind: bool = False) -> None:
        """The children of `module` may be called one after the other: a list has no forward of its own."""
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            for child in module.children():
                self.uses.called.setdefault(id(child), self.where)
        elif isinstance(module, nn.Sequential) or (any_kind and module is not None):
            self.uses.opened.setdefault(id(module), self.where)

    def _resolve(self, node: ast.AST) -> nn.Module | None:
        """The module that ``self.a.b[0]`` is."""
        if isinstance(node, ast.Name):
            return self.module if is_named(node, self.self_name) else None
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            return None if owner is None else owner._modules.get(node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            owner, index = self._resolve(node.value), node.slice.value
            if isinstance(index, int) and isinstance(owner, nn.Sequential | nn.ModuleList):
                return owner[index] if -len(owner) <= index < len(owner) else None
            return owner._modules.get(str(index)) if isinstance(owner, nn.ModuleDict) else None
        return None


# ---- Methods and their source -------------------------------------------------------------------------


def methods_of(kind: type[nn.Module]) -> dict[str, Any]:
    """The functions of a class of the user's, properties included, by name."""
    members: dict[str, Any] = {}
    for base in reversed([base for base in kind.__mro__ if base not in (nn.Module, object)]):
        members.update(vars(base))
    found: dict[str, Any] = {}
    for name, value in members.items():
        function = getattr(value, "fget", None) or getattr(value, "func", None) or value
        function = inspect.unwrap(function) if callable(function) else function
        if inspect.isfunction(function) and not isinstance(value, staticmethod | classmethod):
            found[name] = function
    return found


def is_of_others(function: Any) -> bool:
    """Whether a method comes with PyTorch or a trainer, and so does not know the user's layers."""
    return (getattr(function, "__module__", "") or "").partition(".")[0] in OTHERS


@functools.lru_cache(maxsize=4096)
def source_of(function: Any) -> ast.FunctionDef | None:
    """The source of a function, if there is one."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def running(kind: type[nn.Module]) -> Iterator[tuple[Any, ast.FunctionDef | None]]:
    """The methods that run a module of this class, and those that they call, with their source."""
    methods = methods_of(kind)
    waiting = [name for name in ENTRIES if name in methods]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name in seen or is_of_others(methods[name]):
            continue
        seen.add(name)
        tree = source_of(methods[name])
        yield methods[name], tree
        for node in () if tree is None else ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_named(node.value, self_name(tree)) and node.attr in methods:
                waiting.append(node.attr)


def self_name(function: ast.FunctionDef | None) -> str:
    """What a method calls its module."""
    arguments = [] if function is None else [*function.args.posonlyargs, *function.args.args]
    return arguments[0].arg if arguments else ""


def is_named(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
