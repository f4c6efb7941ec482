"""`fuse` and `unfuse`: the whole of a model at once, or nothing of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from dlfast.fusion.chain import Chain
from dlfast.fusion.forward import FusedForward, forward_of, is_put, put, take_back
from dlfast.fusion.gain import shapes_of
from dlfast.fusion.generate import CannotRewrite, of_nodes, run_name, with_calls
from dlfast.fusion.guard import Guard
from dlfast.fusion.layers import Link
from dlfast.fusion.run import ChainRun, NotFusedWarning, PooledCall, PooledChainRun, Run
from dlfast.fusion.survey import Survey, survey, unfit
from dlfast.fusion.tracing import Level

M = TypeVar("M", bound=nn.Module)


def fuse(model: M, example_inputs: Any = None, *, inplace: bool = False, verbose: bool = False) -> M:
    """The same model with its chains of layers run as one: convolution, normalisation, ReLU, pooling.

    The layers stay what they are, with the very same parameters and buffers, under their own names: optimizers,
    parameter groups, ``state_dict`` keys, checkpoints and whatever walks through ``model.modules()`` keep working.
    Modules whose forward runs a chain are given a forward in which the chain is one operator. At each call it looks
    at the layers; where a hook was registered, a layer replaced or an option changed, it runs them one by one, and
    says so once with a `NotFusedWarning`. What cannot be fused without a chance of changing the model's meaning is
    left as it is; what would not be faster, too. :func:`dlfast.explain` tells which and why, :func:`dlfast.verify`
    compares with the original, :func:`dlfast.unfuse` takes it back.

    Args:
        model: any module, in training or in evaluation mode.
        example_inputs: a tensor, or a tuple of what `model` is called with. With it algorithms are chosen for
            its size, and adaptive poolings may be fused.
        inplace: change `model` itself. Otherwise the result is a copy that shares all parameters and buffers
            with `model`, so that either may be trained.
        verbose: print the table of :func:`dlfast.explain`.

    Returns:
        The fused model, or `model` itself, with a `NotFusedWarning`, where nothing could or should be fused.

    Raises:
        TypeError: `model` is not a module, or a compiled one (fuse first, then compile).
        ValueError: `model` does not run on `example_inputs`.

    >>> import torch, dlfast
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
    ... )
    >>> fused = dlfast.fuse(model)
    >>> fused[0].weight is model[0].weight
    True
    >>> x = torch.randn(2, 3, 10, 10)
    >>> torch.allclose(fused(x), model(x), atol=1e-5)
    True
    """
    check_model("fuse", model)
    inputs = as_inputs(example_inputs)
    found = look(model, inputs)
    if verbose:
        from dlfast.fusion.table import of_survey, print_report

        print_report(of_survey(found, model))
    if not found.fused:
        return _left(model, _why_nothing(found))
    target = model
    if not inplace:
        try:
            target = share(model)
        except Exception as error:
            return _left(model, f"it cannot be copied ({error}); try inplace=True")
        found = look(target, inputs)
    try:
        apply(found)
    except CannotRewrite as error:
        return _left(model, str(error))
    return target


def _left(model: M, why_not: str) -> M:
    warnings.warn(f"dlfast.fuse left {type(model).__name__} as it is: {why_not}", NotFusedWarning, stacklevel=3)
    return model


def unfuse(model: M, *, inplace: bool = False) -> M:
    """The plain network again, with the parameters as they are now.

    Args:
        model: what :func:`fuse` returned; a plain model is handed back as it is.
        inplace: change `model` itself, otherwise the result is a copy that shares parameters and buffers.

    Raises:
        TypeError: `model` is not a module, or a compiled one.
        RuntimeError: somebody has replaced the forward of a fused module since: nothing was changed.

    >>> import torch, dlfast
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> dlfast.unfuse(dlfast.fuse(model))
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): ReLU()
      (2): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
    )
    """
    check_model("unfuse", model)
    if not is_fused(model):
        return model
    for name, module in model.named_modules():
        if is_put(module) and forward_of(module) is None:
            raise RuntimeError(
                f"the forward of {name or 'the model'!r} was replaced since dlfast.fuse: take that back first"
            )
    model = model if inplace else share(model)
    for module in model.modules():
        if is_put(module):
            take_back(module)
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether :func:`fuse` has changed `model`."""
    return any(is_put(module) for module in model.modules())


def check_model(caller: str, model: object) -> None:
    """Refuse what is no module, or a compiled one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise TypeError(
                f"{caller}: model must not be compiled, got {type(model).__name__}: fuse first, then compile"
            )


def as_inputs(example_inputs: Any) -> tuple[Any, ...] | None:
    """`example_inputs` as the positional arguments of the model."""
    if example_inputs is None or isinstance(example_inputs, tuple):
        return example_inputs
    return tuple(example_inputs) if isinstance(example_inputs, list) else (example_inputs,)


def look(model: nn.Module, inputs: tuple[Any, ...] | None) -> Survey:
    """The survey of `model`, with the algorithms for `inputs` where there are any."""
    return survey(model, None if inputs is None or unfit(model) else shapes_of(model, inputs))


def share(model: M) -> M:
    """A copy of `model` that has the very same parameters and buffers."""
    same: dict[int, Tensor] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    same.update({id(t.grad): t.grad for t in model.parameters() if t.grad is not None})
    # What a hook computes before each call (pruning), which cannot be copied, nor need be.
    computed = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    same.update({id(t): t for t in computed if not t.is_leaf})
    return copy.deepcopy(model, dict(same))


def _why_nothing(found: Survey) -> str:
    reasons = [found.why_not] if found.why_not else list(dict.fromkeys(chain.why_not for chain in found.refused))
    reasons += [f"{level.name or 'its forward'} {level.why_not}" for level in found.untraced]
    return "; ".join(reasons[:3]) or "no convolution, normalisation or ReLU is followed by what could be fused with it"


def apply(found: Survey) -> None:
    """Carry out a survey; every step is prepared before the first one is taken."""
    forwards: dict[str, FusedForward] = {}
    levels = {level.name: level for level in found.levels}
    here: dict[str, list[Chain]] = {}
    tails: dict[str, list[Chain]] = {}
    for chain in found.fused:
        here.setdefault(chain.head.level.name, []).append(chain)
        if chain.tail is not None:
            tails.setdefault(chain.tail.level.name, []).append(chain)
    for name in {**here, **tails}:
        forwards[name] = _forward(levels[name], here.get(name, []), tails.get(name, []))
    for name, forward in forwards.items():
        put(levels[name].module, forward)


def _forward(level: Level, chains: list[Chain], tails: list[Chain]) -> FusedForward:
    """The forward of `level` with `chains` of its own, and those of modules that it calls, with a pooling after."""
    runs: dict[str, Run] = {}
    nodes: dict[bool, dict[int, list[fx.Node]]] = {mode: {} for mode in level.graphs}
    for number, chain in enumerate([*chains, *tails]):
        own = number < len(chains)
        of_chain = _nodes(chain) if own else _tail_nodes(chain)
        runs[run_name(number)] = _run(chain, of_chain) if own else _pooled_call(chain, of_chain)
        for mode, found in of_chain.items():
            nodes[mode][number] = found
    sources = {mode: with_calls(graph, nodes[mode]) for mode, graph in level.graphs.items()}
    forward = FusedForward(level.module, Guard.of(level), sources, runs)
    for number, chain in enumerate(chains):
        if chain.tail is not None:
            forward.take_pool(run_name(number), _run(chain, _nodes(chain), pooled=True))  # type: ignore[arg-type]
    return forward


def _nodes(chain: Chain) -> dict[bool, list[fx.Node]]:
    """The nodes of a chain in its own level, one after the other."""
    found = {}
    for mode, graph in chain.head.level.graphs.items():
        own = {site.nodes[mode] for site in (chain.head, *chain.sites, *chain.passed)}
        found[mode] = [node for node in graph.nodes if node in own]
    return found


def _tail_nodes(chain: Chain) -> dict[bool, list[fx.Node]]:
    assert chain.tail is not None
    return {mode: [call, chain.tail.pool.nodes[mode]] for mode, call in chain.tail.calls.items()}


def _run(chain: Chain, nodes: dict[bool, list[fx.Node]], pooled: bool = False) -> ChainRun:
    sites = (chain.head, *chain.sites, *chain.passed)
    links = [Link(site.path, site.module) for site in sites if site.module is not None]
    conv = next((link for link in links if link.kind is nn.Conv2d), None)
    bn = next((link for link in links if link.kind is nn.BatchNorm2d), None)
    others = [link for link in links if link is not conv and link is not bn]
    after = {mode: of_nodes([site.nodes[mode] for site in chain.passed]) for mode in nodes}
    window, adaptive = (chain.window, chain.adaptive) if pooled else (chain.own_window, chain.own_adaptive)
    kind = PooledChainRun if pooled else ChainRun
    plain = {mode: of_nodes(own) for mode, own in nodes.items()}
    return kind(chain.name, conv, bn, others, window, adaptive, plain, after)


def _pooled_call(chain: Chain, nodes: dict[bool, list[fx.Node]]) -> PooledCall:
    tail = chain.tail
    assert tail is not None
    links = [] if tail.pool.module is None else [Link(tail.pool.path, tail.pool.module)]
    plain = {mode: of_nodes(own) for mode, own in nodes.items()}
    return PooledCall(tail.path, tail.path, type(chain.head.level.module), links, plain)
