"""A forward with generated code, for what is written as functions and not as layers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import CodeType, ModuleType
from typing import Any

from torch import fx, nn

from dlfast.fusion.chain import Chain
from dlfast.fusion.guard import GuardedForward
from dlfast.fusion.source import MISSING
from dlfast.fusion.tracing import Level
from dlfast.nn.relu_pool import relu_pool2d


class CannotRewrite(Exception):
    """The generated code would not mean the same; the message says why."""


class RewrittenForward(GuardedForward):
    """The forward of `module` without the places that a fused layer took over.

    `flags` are all attributes of the module that the code has taken in, `layers` the layers of its chains.
    """

    def __init__(
        self,
        module: nn.Module,
        flags: Mapping[str, Any],
        layers: Mapping[str, nn.Module],
        sources: dict[bool, str],
        names: dict[str, tuple[str, str]],
    ) -> None:
        super().__init__(module, flags, layers)
        self.sources = sources
        self.names = names
        self._compile()

    def _compile(self) -> None:
        scope = {name: _load(place) for name, place in self.names.items()}
        self._forward = {}
        for mode, source in self.sources.items():
            made: dict[str, Any] = dict(scope)
            exec(compile(source, f"<dlfast.fuse of {type(self.module).__name__}.forward>", "exec"), made)
            self._forward[mode] = made["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        return self._forward[self.module.training](self.module, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """Where torch.export looks for the code that runs."""
        code: CodeType = self._forward[self.module.training].__code__
        return code

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()


def rewrite(
    level: Level, chains: list[Chain], removed: dict[bool, set[fx.Node]], layers: Mapping[str, nn.Module]
) -> RewrittenForward:
    """The forward of `level` without the nodes in `removed`.

    A chain of `chains` that begins in a function becomes a call of `relu_pool2d`, in place of its first node.

    Raises:
        CannotRewrite: something in the graph has no name by which code could reach it again.
    """
    sources, names = {}, {}
    for mode, graph in level.graphs.items():
        copied: dict[fx.Node, fx.Node] = {}
        own = fx.Graph()
        own.output(own.graph_copy(graph, copied))
        for chain in chains:
            _call_function(own, chain, copied, mode)
        for node in removed[mode]:
            here = copied[node]
            source = here.args[0] if here.args else here.kwargs["input"]
            assert isinstance(source, fx.Node)
            here.replace_all_uses_with(source)
            own.erase_node(here)
        for node in own.nodes:
            node.type = None  # annotations would need names of the user's module
        code = own.python_code("self")
        sources[mode] = code.src
        for name, value in code.globals.items():
            names[name] = _place_of(name, value)
    findings = level.findings
    return RewrittenForward(level.module, findings.constants | findings.flags, layers, sources, names)


def _call_function(graph: fx.Graph, chain: Chain, copied: dict[fx.Node, fx.Node], mode: bool) -> None:
    """In place of the ReLU: what stands between it and the pooling then acts on the maxima of what it acted on."""
    relu = copied[chain.head.nodes[mode]]
    with graph.inserting_after(relu):
        call = graph.call_function(relu_pool2d, (), chain.window.options())
    relu.replace_all_uses_with(call)
    call.args = (relu,)


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
