"""The chains of a whole model: found, checked against everything that could tell the difference, weighed.

Nothing here changes the model; what is decided here `dlfast.fusion.api` carries out as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from dlfast.fusion.chain import Chain, chains_of, extend
from dlfast.fusion.forward import is_put
from dlfast.fusion.gain import Shapes, spare_the_host, weigh
from dlfast.fusion.steps import Step
from dlfast.fusion.tracing import Level, trace
from dlfast.nn.plain import HOOKS

# What makes a new tensor, so that ReLU in place on it is seen by nobody else.
FRESH = (nn.BatchNorm2d, nn.Conv2d, nn.Linear, nn.SyncBatchNorm)


@dataclass
class Survey:
    """What was found in a model."""

    chains: list[Chain] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    why_not: str = ""  # for the whole model

    @property
    def fused(self) -> list[Chain]:
        return [chain for chain in self.chains if not chain.why_not]

    @property
    def refused(self) -> list[Chain]:
        return [chain for chain in self.chains if chain.why_not]

    @property
    def untraced(self) -> list[Level]:
        """Modules whose forward could not be followed; what is inside of their children may still fuse."""
        return [level for level in self.levels if level.why_not]


def survey(model: nn.Module, shapes: Shapes | None = None) -> Survey:
    """Find the chains of `model`; `shapes` are the inputs of its layers where example inputs were given."""
    found = Survey(why_not=unfit(model))
    if found.why_not:
        return found
    found.levels = [trace(name, module) for name, module in model.named_modules() if _has_own_forward(module)]
    tails: dict[int, Chain] = {}
    call_counts = _calls(found.levels)
    for level in reversed(found.levels):  # children come after their parents in named_modules
        if level.why_not:
            continue
        _extend_tails(level, tails, call_counts)
        own = [chain for chain in chains_of(level, _is_head) if chain.sites or chain.why_not]
        found.chains += own
        tail = _tail(level, own)
        if tail is not None:
            tails[id(level.module)] = tail
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found.chains.sort(key=lambda chain: order.get(chain.head.name, order.get(chain.head.level.name, 0)))
    for chain in found.fused:
        chain.why_not = _why_not(chain)
    for chain in found.fused:
        chain.why_not = weigh(chain, shapes)
        if chain.why_not and chain.tail is not None:  # perhaps without the pooling
            pooling, chain.tail = chain.tail, None
            if _why_not(chain) or weigh(chain, shapes):
                chain.tail = pooling
            else:
                chain.why_not = ""
    spare_the_host(found.fused, model)
    return found


def _calls(levels: Iterable[Level]) -> dict[int, dict[str, int]]:
    """How often each module is called: by its id, and by the level that calls it; the mode with more counts."""
    counted: dict[int, dict[str, int]] = {}
    for level in levels:
        for graph in level.graphs.values():
            here = Counter(
                id(level.module.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module"
            )
            for key, count in here.items():
                of_module = counted.setdefault(key, {})
                of_module[level.name] = max(of_module.get(level.name, 0), count)
    return counted


def unfit(model: nn.Module) -> str:
    """Why nothing in `model` may be fused."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return "it is, or contains, a scripted or frozen module"
        if type(module).__module__.startswith("torch.ao."):
            return "it is quantised, or prepared for it"
        if is_put(module):
            return "it is already fused"
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            return f"its {type(module).__name__} {name!r} is not initialised: run the model once first"
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device.type for tensor in tensors}
    if "meta" in devices:
        return "its parameters are on the meta device"
    if len({tensor.device for tensor in tensors}) > 1:
        return f"its parameters are on several devices: {', '.join(sorted({str(t.device) for t in tensors}))}"
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return f"it is wrapped in {type(model).__name__}: fuse before wrapping"
    if _sharded(tensors):
        return "its parameters are sharded: fuse before sharding"
    return ""


def _sharded(tensors: Iterable[torch.Tensor]) -> bool:
    return any(type(tensor).__name__ == "DTensor" or hasattr(tensor, "_local_tensor") for tensor in tensors)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether fx looks inside: modules of the user's and Sequentials, not the layers of torch and ours."""
    kind = type(module)
    if kind.forward is nn.Sequential.forward:
        return True
    top = kind.__module__.partition(".")[0]
    of_torch = top in ("torch", "dlfast") and not isinstance(module, fx.GraphModule)
    return not of_torch and next(module.children(), None) is not None


def _is_head(step: Step) -> bool:
    """What begins a chain, or is a convolution that cannot, to be told of."""
    unusual = step.kind == "other" and bool(step.why_not) and isinstance(step.module, nn.Conv2d)
    return unusual or step.kind in ("conv", "bn", "relu")


def _tail(level: Level, chains: list[Chain]) -> Chain | None:
    """The chain whose value is all that `level` returns, if a pooling may still join it."""
    for chain in chains:
        if chain.why_not or chain.last is None or chain.own_window.pool is not None or chain.kind == "relu":
            continue
        if all(_is_output(graph, chain.last.nodes[mode]) for mode, graph in level.graphs.items()):
            return chain
    return None


def _is_output(graph: fx.Graph, node: fx.Node) -> bool:
    return [user.op for user in node.users] == ["output"] and graph.output_node().args == (node,)


def _extend_tails(level: Level, tails: dict[int, Chain], call_counts: dict[int, dict[str, int]]) -> None:
    by_mode: dict[int, dict[bool, fx.Node]] = {}
    for mode, graph in level.graphs.items():
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            module = level.module.get_submodule(str(node.target))
            hooked = any(getattr(module, kind) for kind in HOOKS)
            if id(module) in tails and call_counts[id(module)] == {level.name: 1} and not hooked:
                by_mode.setdefault(id(module), {})[mode] = node
    for key, nodes in by_mode.items():
        if len(nodes) == len(level.graphs):
            extend(tails[key], level, nodes)


# ---- What could tell the difference -------------------------------------------------------------------


def _why_not(chain: Chain) -> str:
    """Why `chain` must stay as it is; empty where nothing is against it."""
    levels = [chain.head.level] if chain.tail is None else [chain.head.level, chain.tail.level]
    for level in levels:
        if level.findings.not_rewritten:
            return f"a forward without it cannot be generated: {level.findings.not_rewritten}"
    if chain.kind == "relu" and chain.window.pool is None:
        return "a ReLU alone has nothing to gain"
    if chain.kind == "relu" and not _relu_may_move(chain):
        return "the ReLU changes in place a tensor that others may see"
    return ""


def _relu_may_move(chain: Chain) -> bool:
    """ReLU in place may be put off only where its input is a tensor that nobody else holds."""
    for node in chain.head.nodes.values():
        module = chain.head.module
        in_place = module.inplace if isinstance(module, nn.ReLU) else node.kwargs.get("inplace", False)
        named = str(node.target).endswith("_") or getattr(node.target, "__name__", "").endswith("_")
        if not (in_place or named):
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1 or source.op != "call_module":
            return False
        if not isinstance(chain.head.level.module.get_submodule(str(source.target)), FRESH):
            return False
    return True
