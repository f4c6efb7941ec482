"""What a trace of a Python function does not tell: branches it did not take, and effects it cannot see.

A trace follows one path. It stands for the function only where every branch depends on what stays as it is
(the module's own flags, whether a child is there) or is traced both ways (``self.training``), and where
nothing is written but local variables. To put generated code in place of the function more must hold:
nothing may be computed outside of the graph, and what it read from the module must still be the same, which
the generated code checks.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn

MUTATORS = {
    "append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard",
    "register_buffer", "register_parameter", "add_module", "__setattr__", "__setitem__", "put",
}  # fmt: skip
RANDOM = {"rand", "randn", "randint", "randperm", "normal", "seed", "initial_seed", "manual_seed", "uniform", "random"}
WALKS = {"children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}
SCRIPTING = {"torch.jit.is_scripting", "torch.jit.is_tracing"}
COMPREHENSIONS = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"}
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
MISSING = object()
A_LAYER = "a layer"  # in place of a layer, of which a forward asks whether it is there


@dataclass
class Findings:
    """What the source of a forward allows."""

    not_traced: str = ""  # why a trace does not stand for it
    not_rewritten: str = ""  # why generated code may not replace it
    constants: dict[str, Any] = field(default_factory=dict)  # attributes of the module that a trace freezes
    flags: dict[str, Any] = field(default_factory=dict)  # those, by their path, that may decide which layers are called
    globals: dict[tuple[str, str], Any] = field(default_factory=dict)  # variables of Python modules that it freezes
    methods: set[str] = field(default_factory=set)  # of the module's class that it enters
    walks: bool = False  # goes through the children of the module, whichever they are


@dataclass(frozen=True)
class Entered:
    """A Python function that a trace has entered, by its code, and the global names it sees."""

    code: CodeType
    scope: dict[str, Any] = field(compare=False)


def study(module: nn.Module, entered: Iterable[Entered]) -> Findings:
    """What the functions that a trace of `module` has entered allow."""
    found = Findings()
    for code, scope in ((each.code, each.scope) for each in entered):
        if code.co_name in COMPREHENSIONS:  # part of the function around them
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
        except (OSError, TypeError, SyntaxError, IndentationError):
            found.not_traced = f"the source of {code.co_name} is not available"
            return found
        _Reader(module, code, scope, found).visit(tree.body[0])
    return found


class _Reader(ast.NodeVisitor):
    """Walks one function; the first reason of each kind counts."""

    def __init__(self, module: nn.Module, code: CodeType, scope: dict[str, Any], found: Findings) -> None:
        self.module, self.code, self.scope, self.found = module, code, scope, found
        self.locals = {*code.co_varnames, *code.co_cellvars}
        self.self_name = code.co_varnames[0] if code.co_argcount and _is_method_of(code, type(module)) else ""
        self.called: set[int] = set()  # ids of the names that something is called by, `f` of f(x) and f.g(x)

    def _not_traced(self, node: ast.AST, why: str) -> None:
        if not self.found.not_traced:
            self.found.not_traced = f"{self._place(node)} {why}"

    def _not_rewritten(self, node: ast.AST, why: str) -> None:
        if not self.found.not_rewritten:
            self.found.not_rewritten = f"{self._place(node)} {why}"

    def _place(self, node: ast.AST) -> str:
        return f"{self.code.co_name}, line {self.code.co_firstlineno + getattr(node, 'lineno', 1) - 1},"

    # ---- Branches

    def _branch(self, node: ast.AST, test: ast.expr) -> None:
        if not self._stays(test):
            self._not_traced(node, f"branches on `{ast.unparse(test)}`")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) == "torch.jit.is_scripting()":  # what a scripted module does is not at stake
            for statement in node.orelse:
                self.visit(statement)
            return
        self._branch(node, node.test)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node, node.test)

    def visit_While(self, node: ast.While) -> None:
        self._branch(node, node.test)

    def visit_Assert(self, node: ast.Assert) -> None:
        self._branch(node, node.test)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._branch(test, test)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        if not self._stays(node):
            self._not_traced(node, f"branches on `{ast.unparse(node)}`")
        self.generic_visit(node)

    def visit_Match(self, node: ast.Match) -> None:
        self._not_traced(node, "uses match")

    def visit_Try(self, node: ast.Try) -> None:
        self._not_traced(node, "catches exceptions")

    def visit_With(self, node: ast.With) -> None:
        self._not_traced(node, f"runs under `with {ast.unparse(node.items[0].context_expr)}`")

    def _stays(self, test: ast.expr) -> bool:
        """Whether `test` depends only on flags of the module, constants and types."""
        if isinstance(test, ast.BoolOp):
            return all(self._stays(value) for value in test.values)
        if isinstance(test, ast.UnaryOp):
            return self._stays(test.operand)
        if isinstance(test, ast.Compare):
            return all(self._stays(value) for value in (test.left, *test.comparators))
        if isinstance(test, ast.Constant):
            return True
        if isinstance(test, ast.Tuple | ast.List | ast.Set):
            return all(self._stays(value) for value in test.elts)
        if isinstance(test, ast.Attribute):
            return self._is_flag(test)
        if isinstance(test, ast.Call):
            name = ast.unparse(test.func)
            if name in SCRIPTING:
                return True
            return name == "len" and self._stays(test.args[0])
        return False

    def _is_flag(self, test: ast.Attribute) -> bool:
        """Whether `test` is reached from the module and can be compared with what it is now, which is noted."""
        path = ast.unparse(test).partition(".")[2]
        if path == "training" and self._value(test) is not MISSING:
            return True
        value = self._value(test)
        if value is MISSING or test.attr == "training":  # the mode of a child is not traced both ways
            return False
        if not isinstance(value, nn.Module) and not is_plain(value):
            return False
        self.found.flags[path] = A_LAYER if isinstance(value, nn.Module) else copy.deepcopy(value)
        return True

    # ---- Effects

    def _store(self, target: ast.expr) -> None:
        if isinstance(target, ast.Attribute):
            self._not_traced(target, f"writes `{ast.unparse(target)}`")
        elif isinstance(target, ast.Subscript):
            base = target.value
            if not (isinstance(base, ast.Name) and base.id in self.locals):
                self._not_traced(target, f"writes `{ast.unparse(target)}`")
        elif isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self._store(element)
        elif isinstance(target, ast.Starred):
            self._store(target.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._store(target)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._store(node.target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._store(node.target)
        if node.value is not None:
            self.visit(node.value)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if not isinstance(target, ast.Name):
                self._not_traced(node, f"deletes `{ast.unparse(target)}`")

    def visit_Global(self, node: ast.Global) -> None:
        self._not_traced(node, "writes global variables")

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self._not_traced(node, "writes variables of another function")

    def visit_Await(self, node: ast.Await) -> None:
        self._not_traced(node, "awaits")

    def visit_Yield(self, node: ast.Yield) -> None:
        self._not_traced(node, "is a generator")

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not self.self_name and self.code.co_varnames[:1] == ("self",):
            self._not_rewritten(node, "is a method of something else")
        for statement in node.body:  # neither decorators nor annotations
            self.visit(statement)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            self._not_rewritten(node, f"calls {node.value.func.id} for its effect")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        func = node.func
        self.called.add(id(_root(func)))
        if isinstance(func, ast.Attribute):
            root = _root(func)
            local = isinstance(root, ast.Name) and root.id in self.locals and root.id != self.self_name
            if func.attr in MUTATORS and not (local and isinstance(func.value, ast.Name)):
                self._not_traced(node, f"calls `{ast.unparse(func)}`")
            if func.attr in RANDOM:
                self._not_rewritten(node, f"draws numbers with `{ast.unparse(func)}`")
            if isinstance(root, ast.Name) and root.id not in self.locals:
                self._outside(node, self._global(root.id), ast.unparse(func))
        elif isinstance(func, ast.Name) and func.id not in self.locals:
            self._outside(node, self._global(func.id), func.id)
        if isinstance(func, ast.Name) and func.id in ("getattr", "setattr", "delattr", "eval", "exec"):
            self._not_rewritten(node, f"calls {func.id}")
        self.generic_visit(node)

    def _outside(self, node: ast.AST, value: Any, name: str) -> None:
        """A call of something that is not of this function: torch's, builtin, or traced in its turn."""
        owner = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or "builtins"
        top = owner.partition(".")[0]
        if (
            isinstance(value, ModuleType) and top not in ("torch", "math", "functools", "operator", "dlfast")
        ) or top in ("random", "time", "os", "numpy"):
            self._not_rewritten(node, f"calls `{name}`, which a trace would freeze")

    # ---- What is read from the module, and from outside of the function

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id == self.self_name and self.self_name:
            self._read(node)
        elif isinstance(owner, ast.Attribute) and is_plain(value := self._value(node)):
            self.found.constants[ast.unparse(node).partition(".")[2]] = copy.deepcopy(value)
            return  # by its whole path, whatever it is an attribute of
        elif isinstance(owner, ast.Name) and owner.id not in self.locals:
            self._read_outside(node, self._global(owner.id))
        self.generic_visit(node)

    def _read_outside(self, node: ast.Attribute, owner: Any) -> None:
        value = getattr(owner, node.attr, MISSING) if isinstance(owner, ModuleType | type) else MISSING
        if value is MISSING or not is_plain(value) or owner.__name__.partition(".")[0] in ("torch", "math"):
            return
        if isinstance(owner, type):
            self._not_rewritten(node, f"reads `{ast.unparse(node)}`, which a trace would freeze")
        else:
            self.found.globals[owner.__name__, node.attr] = copy.deepcopy(value)

    def visit_Name(self, node: ast.Name) -> None:
        name = node.id
        if name in self.locals or not isinstance(node.ctx, ast.Load):
            return
        if name in self.code.co_freevars:
            if name != "__class__" and id(node) not in self.called:
                self._not_rewritten(node, f"reads `{name}` of the function around it, which a trace would freeze")
            return
        value = self.scope.get(name, MISSING)
        owner = self.scope.get("__name__", "")
        if value is MISSING or isinstance(value, ModuleType) or callable(value):
            return
        if is_plain(value) and vars(sys.modules.get(owner, object)) is self.scope:
            self.found.globals[owner, name] = copy.deepcopy(value)
        else:
            self._not_rewritten(node, f"reads `{name}`, which a trace would freeze")

    def _read(self, node: ast.Attribute) -> None:
        if node.attr == "training":
            return
        if node.attr == "_modules":
            self.found.walks = True
            return
        value = self._value(node)
        if value is MISSING:
            self._not_rewritten(node, f"reads `{ast.unparse(node)}`, which is not there")
        elif is_plain(value):
            self.found.constants[node.attr] = copy.deepcopy(value)
            # A number that is not a whole one decides only where it is compared.
            if not isinstance(value, float | torch.dtype | torch.device):
                self.found.flags[node.attr] = copy.deepcopy(value)
        elif isinstance(value, nn.Module | torch.Tensor):
            pass
        elif node.attr not in self.module.__dict__ and callable(value):
            self.found.methods.add(node.attr)
            self.found.walks = self.found.walks or node.attr in WALKS
        elif inspect.isfunction(value) or inspect.isbuiltin(value):
            self.found.constants[node.attr] = value
        else:
            self._not_rewritten(node, f"reads `{ast.unparse(node)}`, which a trace would freeze")

    def _value(self, node: ast.Attribute) -> Any:
        """The value of an attribute that is reached from the module itself, or MISSING."""
        if isinstance(node.value, ast.Name):
            owner: Any = self.module if node.value.id == self.self_name else MISSING
        elif isinstance(node.value, ast.Attribute):
            owner = self._value(node.value)
        else:
            owner = MISSING
        if owner is MISSING:
            return MISSING
        try:
            return getattr(owner, node.attr, MISSING)
        except Exception:  # a property of the user's that cannot be read now tells nothing
            return MISSING

    def _global(self, name: str) -> Any:
        return self.scope.get(name, getattr(builtins, name, MISSING))


def _is_method_of(code: CodeType, kind: type) -> bool:
    functions = (vars(base).get(code.co_name) for base in kind.__mro__)
    codes = [getattr(function, "__code__", None) for function in functions]
    # Not by identity: fx runs a changed copy of a function with keyword-only arguments.
    return any(c and (c.co_filename, c.co_firstlineno) == (code.co_filename, code.co_firstlineno) for c in codes)


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def value_at(module: nn.Module, path: tuple[str, ...]) -> Any:
    """The attribute of `module` at `path` as it is now, as `Findings.flags` has it."""
    value: Any = module
    for part in path:
        value = getattr(value, part, MISSING)
    return A_LAYER if isinstance(value, nn.Module) else value


def is_plain(value: Any) -> bool:
    """Whether `value` can be compared with what it was."""
    if isinstance(value, tuple | list | set):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(is_plain(item) for pair in value.items() for item in pair)
    return isinstance(value, PLAIN)
