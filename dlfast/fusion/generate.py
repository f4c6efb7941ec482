"""Python code for a traced forward in which chains of nodes have become calls."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from torch import fx

from dlfast.fusion.source import MISSING


class CannotRewrite(Exception):
    """The generated code would not mean the same; the message says why."""


@dataclass(frozen=True)
class Source:
    """The text of a function called ``forward``, and where it finds the names that it uses."""

    text: str
    names: dict[str, tuple[str, str]]  # module and name in it

    def renamed(self, old: str, new: str) -> Source:
        """The same with calls of `new` in place of `old`."""
        return Source(self.text.replace(f"{old}(", f"{new}("), self.names)


def run_name(number: int) -> str:
    """What generated code calls the chain with this number."""
    return f"dlfast_chain_{number}"


def compiled(source: Source, runs: Mapping[str, Any], label: str) -> Callable[..., Any]:
    """The function of `source`, which finds the chains of a forward in `runs`."""
    scope: dict[str, Any] = {name: _load(place) for name, place in source.names.items()}
    scope.update(runs)
    exec(_code_of(source.text, label), scope)
    # Its globals must not lead back to it: nobody would free them but the garbage collector.
    function: Callable[..., Any] = scope.pop("forward")
    return function


@functools.lru_cache(maxsize=1024)
def _code_of(text: str, label: str) -> CodeType:
    """Kept, since every copy of a model needs it again."""
    return compile(text, label, "exec")


def with_calls(graph: fx.Graph, chains: Mapping[int, list[fx.Node]]) -> Source:
    """The forward that `graph` is a trace of, each chain of nodes being one call of ``run_name(its number)``.

    Raises:
        CannotRewrite: something in the graph has no name by which code could reach it again.
    """
    own, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    own.output(own.graph_copy(graph, copied))
    for number, nodes in chains.items():
        with own.inserting_after(copied[nodes[-1]]):
            call = own.call_function(_mark(number), ())
        copied[nodes[-1]].replace_all_uses_with(call)
        call.args = (input_of(copied[nodes[0]]),)
        for node in reversed(nodes):
            own.erase_node(copied[node])
    source = _source(own)
    text = source.text
    for number in chains:
        text = text.replace(f"{run_name(number)}(", f"{run_name(number)}(self, ")
    return Source(text, source.names)


def of_nodes(nodes: Iterable[fx.Node]) -> Source | None:
    """A function of the module and an input that does what `nodes`, one after the other, do; None of no nodes."""
    own = fx.Graph()
    value = own.placeholder("input")
    count = 0
    for node in nodes:
        before, now = input_of(node), value
        value = own.node_copy(node, lambda each, before=before, now=now: now if each is before else each)  # type: ignore[misc]
        count += 1
    own.output(value)
    return _source(own) if count else None


def input_of(node: fx.Node) -> fx.Node:
    """The one node that a link of a chain takes."""
    (source,) = node.all_input_nodes
    return source


def _mark(number: int) -> Callable[..., None]:
    """A function that fx writes as `run_name(number)`."""

    def mark() -> None:
        """Stands in the graph for what the generated code finds by name."""

    mark.__module__, _, mark.__name__ = run_name(number).partition("_")
    return mark


def _source(graph: fx.Graph) -> Source:
    for node in graph.nodes:
        node.type = None  # annotations would need names of the user's module
    code = graph.python_code("self")
    names = {
        name: _place_of(name, value)
        for name, value in code.globals.items()
        if not name.startswith(run_name(0)[:-1])  # found in the forward's own runs
    }
    return Source(code.src, names)


def _place_of(name: str, value: Any) -> tuple[str, str]:
    """Module and name under which generated code finds `value` again, also in another process."""
    if isinstance(value, ModuleType):
        return value.__name__, ""
    if isinstance(value, float):  # fx knows inf and nan by these names
        return "math", name
    if value is type(None):
        return "types", "NoneType"
    place = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if place[0] is None or _load(place, MISSING) is not value:  # type: ignore[arg-type]
        raise CannotRewrite(f"`{name}` is not to be found again by name")
    return place  # type: ignore[return-value]


def _load(place: tuple[str, str], default: Any = None) -> Any:
    module, path = place
    value: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        value = getattr(value, part, default)
    return value
