"""The chains of a whole model: found, checked against everything that could tell the difference, weighed.

Nothing here changes the model; what is decided here `dlfast.fusion.swap` carries out as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from dlfast.fusion.chain import Chain, Site, chains_of, extend
from dlfast.fusion.exposure import called_by_traces_alone, calls, exposed, uses_of
from dlfast.fusion.gain import Shapes, weigh
from dlfast.fusion.guard import is_guarded
from dlfast.fusion.methods import Uses
from dlfast.fusion.steps import Step, hooks_of
from dlfast.fusion.tracing import Level, trace

# What makes a new tensor, so that ReLU in place on it is seen by nobody else.
FRESH = (nn.BatchNorm2d, nn.Conv2d, nn.Linear, nn.SyncBatchNorm)


@dataclass
class Survey:
    """What was found in a model."""

    chains: list[Chain] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    why_not: str = ""  # for the whole model
    alone: set[int] = field(default_factory=set)  # ids of modules that only the traced forwards call

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


def survey(model: nn.Module, shapes: Shapes | None = None, held: Collection[int] = frozenset()) -> Survey:
    """Find the chains of `model`.

    `shapes` are the inputs of its layers where example inputs were given, `held` the ids of layers that somebody
    outside of the model has and that must stay what they are.
    """
    found = Survey(why_not=_unfit(model))
    if found.why_not:
        return found
    found.levels = [trace(name, module) for name, module in model.named_modules() if _has_own_forward(module)]
    opened = exposed(model, found.levels)
    found.alone = called_by_traces_alone(model, found.levels) - opened
    found.alone -= {id(m) for m in model.modules() if id(m) in held and not m._parameters}
    by_module = {id(level.module): level for level in found.levels}
    tails: dict[int, Chain] = {}
    call_counts = calls(found.levels)
    for level in reversed(found.levels):  # children come after their parents in named_modules
        if level.why_not:
            continue
        _extend_tails(level, tails, call_counts)
        own = [chain for chain in chains_of(level, _is_head) if chain.sites or chain.why_not]
        found.chains += own
        tail = _tail(level, own)
        if tail is not None and id(level.module) in by_module:
            tails[id(level.module)] = tail
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found.chains.sort(key=lambda chain: order.get(chain.head.name, order.get(chain.head.level.name, 0)))
    _check(found, model, call_counts, opened)
    _check_held(found, held)
    for chain in found.fused:
        chain.why_not = weigh(chain, shapes)
    _settle(found, call_counts)
    return found


def _unfit(model: nn.Module) -> str:
    """Why nothing in `model` may be fused."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return "it is, or contains, a scripted or frozen module"
        if type(module).__module__.startswith("torch.ao."):
            return "it is quantised, or prepared for it"
        if "_dlfast_plain" in module.__dict__ or is_guarded(module):
            return "it is already fused"
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
        if chain.why_not or chain.last is None or chain.window.pool is not None or chain.kind == "relu":
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
            if node.op == "call_module":
                key = id(level.module.get_submodule(str(node.target)))
                if key in tails and call_counts[key] == {level.name: 1} and not hooks_of(tails[key].head.level.module):
                    by_mode.setdefault(key, {})[mode] = node
    for key, nodes in by_mode.items():
        if len(nodes) == len(level.graphs):
            extend(tails[key], level, nodes)


# ---- What could tell the difference -------------------------------------------------------------------


def _check(found: Survey, model: nn.Module, call_counts: dict[int, dict[str, int]], opened: set[int]) -> None:
    uses = uses_of(found.levels)
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for chain in found.fused:
        levels = {id(site.level.module): site.level for site in (chain.head, *chain.sites)}
        if any(key in opened for key in (*levels, id(chain.head.module))):
            chain.why_not = "its layers may be run one by one: they are not only called as a whole"
        elif method := _method_that_uses(chain, uses):
            chain.why_not = f"{method} may run its layers one by one"
        elif any(m is not None and names[id(m)] > 1 for m in (chain.head.module, chain.bn)):
            chain.why_not = "the layer is registered under several names"
        elif chain.kind == "relu" and chain.window.pool is None:
            chain.why_not = "a ReLU alone has nothing to gain"
        elif chain.kind == "relu" and not _relu_may_move(chain):
            chain.why_not = "the ReLU changes in place a tensor that others may see"
        elif chain.bn is not None and not isinstance(chain.bn.num_features, int):
            chain.why_not = "the normalisation is not initialised"
    _check_repeats(found, call_counts)


def _check_held(found: Survey, held: Collection[int]) -> None:
    """Whoever has the head of a chain and what follows it would see both change, or one without the other."""
    for chain in found.fused:
        modules = {id(site.module) for site in chain.sites if site.module is not None and not site.module._parameters}
        if chain.kind != "relu" and id(chain.head.module) in held and any(key in held for key in modules):
            chain.why_not = "its layers are also held outside of the model: fuse a copy, with inplace=False"


def _method_that_uses(chain: Chain, uses: Uses) -> str:
    """The method beside forward that runs a part of `chain` by itself, if there is one."""
    levels = {id(site.level.module): site.level.module for site in (chain.head, *chain.sites)}
    for site in (chain.head, *chain.sites):
        if site.module is not None and id(site.module) in uses.called:
            return uses.called[id(site.module)]
    if len(levels) > 1 and id(chain.head.level.module) in uses.called:  # would now end with its parent's pooling
        return uses.called[id(chain.head.level.module)]
    return next((uses.opened[key] for key in levels if key in uses.opened), "")


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


def _check_repeats(found: Survey, call_counts: dict[int, dict[str, int]]) -> None:
    """A layer called several times does the same each time, or nothing of it is fused."""
    by_head: dict[int, list[Chain]] = {}
    for chain in found.chains:
        if chain.head.module is not None and chain.kind != "relu":
            by_head.setdefault(id(chain.head.module), []).append(chain)
    for key, chains in by_head.items():
        alike = {(chain.window, chain.adaptive, id(chain.bn)) for chain in chains}
        called = call_counts.get(key, {})
        if len(alike) > 1 or len(called) > 1 or sum(called.values()) != len(chains):
            for chain in chains:
                chain.why_not = chain.why_not or "the layer is called several times, with different layers after it"
        elif reason := next((chain.why_not for chain in chains if chain.why_not), ""):
            for chain in chains:
                chain.why_not = reason


# ---- How each place is taken out ----------------------------------------------------------------------


def swappable(found: Survey, call_counts: dict[int, dict[str, int]]) -> set[int]:
    """The ids of the modules all of whose calls the fused chains take over."""
    taken = Counter(id(site.module) for chain in found.fused for site in chain.sites if site.module is not None)
    taken.update(id(c.head.module) for c in found.fused if c.kind == "relu" and c.head.module is not None)
    return {
        key
        for key, count in taken.items()
        if key in found.alone and call_counts.get(key) and sum(call_counts[key].values()) == count
    }


def removed_sites(chain: Chain, whole: set[int]) -> list[Site]:
    """The places that only generated code can leave out."""
    sites = [*chain.sites, chain.head] if chain.kind == "relu" else chain.sites
    if chain.kind == "relu" and not all(id(site.module) in whole for site in sites):
        return sites  # a function takes the place of all
    return [site for site in sites if site.module is None or id(site.module) not in whole]


def _settle(found: Survey, call_counts: dict[int, dict[str, int]]) -> None:
    """Refuse what would need generated code where there can be none, until nothing changes."""
    while True:
        whole = swappable(found, call_counts)
        refused = False
        for chain in found.fused:
            for site in removed_sites(chain, whole):
                reason = site.level.findings.not_rewritten
                if site.module is not None and chain.bn is site.module:
                    reason = "the normalisation is also called elsewhere"
                if reason:
                    chain.why_not = f"`{site.name}` cannot be left out: {reason}"
                    refused = True
                    break
        _check_repeats(found, call_counts)
        if not refused:
            return
