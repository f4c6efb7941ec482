"""`fuse` and `unfuse`: the whole of a model at once, or nothing of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from dlfast.fusion.absorbed import HEADS, PLAIN, Absorbed, AbsorbedBatchNorm2d, Plain, PooledDropout2d, swap, swap_back
from dlfast.fusion.chain import Chain
from dlfast.fusion.exposure import calls
from dlfast.fusion.gain import shapes_of
from dlfast.fusion.guard import FORWARD, GuardedForward, guard, is_guarded, unguard
from dlfast.fusion.held import held_elsewhere
from dlfast.fusion.rewritten import CannotRewrite, rewrite
from dlfast.fusion.survey import Survey, removed_sites, survey, swappable
from dlfast.fusion.tracing import Level

M = TypeVar("M", bound=nn.Module)


class NotFusedWarning(UserWarning):
    """Nothing of a model was fused; the message says why."""


def fuse(model: M, example_inputs: Any = None, *, inplace: bool = False, verbose: bool = False) -> M:
    """The same model with its chains of layers run as one: convolution, normalisation, ReLU, pooling.

    The fused layers are the model's own layers, with the very same parameters and buffers, under their own
    names: optimizers, parameter groups, ``state_dict`` keys and checkpoints made before and after keep
    working. Layers whose work a fused layer does stay where they are and hand on what they are given.
    What cannot be fused without a chance of changing the model's meaning is left as it is; what would not
    be faster, too. :func:`dlfast.explain` tells which and why, :func:`dlfast.verify` compares with the
    original, :func:`dlfast.unfuse` takes it back.

    Args:
        model: any module, in training or in evaluation mode.
        example_inputs: a tensor, or a tuple of what `model` is called with. With it each chain is planned for
            its size, and adaptive poolings may be fused.
        inplace: change `model` itself. Otherwise the result is a copy that shares all parameters and buffers
            with `model`, so that either may be trained. A ReLU or pooling layer that somebody else holds as well
            (a default argument ``act=nn.ReLU()`` of several models) is left as it is in either case.
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
    found = look(model, inputs, inplace=inplace)
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
        RuntimeError: a fused layer has another class or forward by now (a parametrization, ``fully_shard``):
            nothing was changed.

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
    _check_unchanged(model)
    model = model if inplace else share(model)
    for module in model.modules():
        if PLAIN in module.__dict__:
            swap_back(module)
        if is_guarded(module):
            unguard(module)
    return model


def _check_unchanged(model: nn.Module) -> None:
    """Refuse a model whose fused layers somebody has given another class or forward: it would be lost."""
    for name, module in model.named_modules():
        plain: Plain | None = module.__dict__.get(PLAIN)
        if plain is not None and type(module) is not plain.fused:
            raise RuntimeError(
                f"the fused layer {name or 'model'!r} is a {type(module).__name__} by now, no {plain.fused.__name__}: "
                "take back first what changed its class since dlfast.fuse (a parametrization, fully_shard ...)"
            )
        if is_guarded(module) and module.__dict__.get("forward") is not module.__dict__[FORWARD]:
            raise RuntimeError(
                f"the forward of {name or 'the model'!r} was replaced since dlfast.fuse: take that back first"
            )


def is_fused(model: nn.Module) -> bool:
    """Whether :func:`fuse` has changed `model`."""
    return any(PLAIN in module.__dict__ or is_guarded(module) for module in model.modules())


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


def look(model: nn.Module, inputs: tuple[Any, ...] | None, *, inplace: bool = False) -> Survey:
    """The survey of `model`, planned for `inputs` where there are any; `inplace` of a model to change itself."""
    shapes = None if inputs is None else shapes_of(model, inputs)
    return survey(model, shapes, held_elsewhere(model) if inplace else frozenset())


def share(model: M) -> M:
    """A copy of `model` that has the very same parameters and buffers."""
    same: dict[int, Tensor] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    same.update({id(t.grad): t.grad for t in model.parameters() if t.grad is not None})
    return copy.deepcopy(model, dict(same))


def _why_nothing(found: Survey) -> str:
    reasons = [found.why_not] if found.why_not else list(dict.fromkeys(chain.why_not for chain in found.refused))
    reasons += [f"{level.name or 'its forward'} {level.why_not}" for level in found.untraced]
    return "; ".join(reasons[:3]) or "no convolution, normalisation or ReLU is followed by what could be fused with it"


def apply(found: Survey) -> None:
    """Carry out a survey; every step is prepared before the first one is taken."""
    whole = swappable(found, calls(found.levels))
    swaps: dict[int, tuple[nn.Module, type[nn.Module], dict[str, Any]]] = {}
    removed: dict[str, dict[bool, set[fx.Node]]] = {}
    functions: dict[str, list[Chain]] = {}
    levels: dict[str, Level] = {}
    layers: dict[str, dict[str, nn.Module]] = {}
    for chain in found.fused:
        for site in (chain.head, *chain.sites, *chain.passed):
            levels[site.level.name] = site.level
            own = layers.setdefault(site.level.name, {})
            if site.module is not None:
                own[site.path] = site.module
        gone = removed_sites(chain, whole)
        for site in gone:
            for mode, node in site.nodes.items():
                removed.setdefault(site.level.name, {True: set(), False: set()})[mode].add(node)
        for site in chain.sites:
            if site.module is not None and site not in gone:
                kind: type[nn.Module] = AbsorbedBatchNorm2d if site.module is chain.bn else Absorbed
                swaps[id(site.module)] = (site.module, kind, {})
            elif site.module is chain.bn and chain.bn is not None:
                swaps[id(chain.bn)] = (chain.bn, AbsorbedBatchNorm2d, {})
        for site in chain.passed:
            if isinstance(site.module, nn.Dropout2d):
                swaps[id(site.module)] = (site.module, PooledDropout2d, {})
        if chain.kind == "relu" and gone:
            functions.setdefault(chain.head.level.name, []).append(chain)
        else:
            assert chain.head.module is not None
            swaps[id(chain.head.module)] = (chain.head.module, *_head(chain))
    forwards: dict[str, GuardedForward] = {
        name: rewrite(levels[name], functions.get(name, []), nodes, layers[name]) for name, nodes in removed.items()
    }
    for name, level in levels.items():
        if name not in forwards:
            forwards[name] = GuardedForward(level.module, level.findings.flags, layers[name])
    for module, kind, attributes in swaps.values():
        swap(module, kind, attributes)
    for name, forward in forwards.items():
        guard(levels[name].module, forward)


def _head(chain: Chain) -> tuple[type[nn.Module], dict[str, Any]]:
    if chain.kind == "conv":
        attributes = chain.window.options()
        if chain.bn is not None:
            return HEADS["conv bn"], {**attributes, "bn": chain.bn}
        if chain.adaptive is not None:
            return HEADS["conv adaptive"], {**attributes, "adaptive_size": chain.adaptive}
        return HEADS["conv"], attributes
    return HEADS[chain.kind], {"window": chain.window}
