"""What one node of a traced forward does, as far as chains are concerned, however it was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dlfast.functional.window import Window
from dlfast.nn.conv import extras_of, pooling_of
from dlfast.nn.plain import oddity

# Activations that never fall as their input rises: the maximum of a window may be taken before them. Their
# own forward stays where it is and then has less to do.
RISING: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.LeakyReLU: lambda m: m.negative_slope >= 0,
    nn.ReLU6: lambda m: True,
    nn.Hardtanh: lambda m: True,
    nn.Sigmoid: lambda m: True,
    nn.Tanh: lambda m: True,
    nn.Dropout2d: lambda m: True,  # one factor of 0 or more per channel
    nn.Identity: lambda m: True,
}
RISING_FUNCTIONS: set[Any] = {F.relu6, F.sigmoid, F.tanh, torch.sigmoid, torch.tanh}
RELU_FUNCTIONS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_}
# Functions and the arguments after the input that they have, with the module that means the same.
POOL_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.avg_pool2d: (
        nn.AvgPool2d,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d),
        (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    ),
}
POOL_NAMES = {"max_pool2d": F.max_pool2d, "adaptive_max_pool2d": F.adaptive_max_pool2d}
NOT_FUSED_ACTIVATIONS = (nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish, nn.ELU, nn.PReLU, nn.Softplus)
NOT_FUSED_FUNCTIONS: set[Any] = {F.silu, F.hardswish, F.gelu, F.mish, F.elu, F.prelu, F.softplus}


@dataclass(frozen=True)
class Step:
    """One node as a link of a chain. `kind` is "conv", "bn", "relu", "pool", "rising" or "other"."""

    kind: str
    node: fx.Node
    module: nn.Module | None = None
    window: Window | None = None  # of a pooling, with activation=None
    adaptive: tuple[int | None, int | None] | None = None  # output size of an adaptive pooling
    in_place: bool = False
    why_not: str = ""  # for what looks like a link and cannot be one

    @property
    def input(self) -> Any:
        return self.node.args[0] if self.node.args else self.node.kwargs.get("input")

    def describe(self) -> str:
        """For people, and to compare the same place in two traces."""
        what = self.kind if self.kind != "pool" or self.window is None else f"{self.window.pool} pool"
        if self.kind in ("rising", "other"):
            what = type(self.module).__name__ if self.module is not None else str(self.node.target)
        return f"{what}:{self.window}{self.adaptive}" if self.kind == "pool" else what


def recognise(node: fx.Node, root: nn.Module) -> Step:
    """What `node` of a graph traced from `root` does."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if len(node.args) + len(node.kwargs) != 1:
            return Step("other", node, module)
        return _of_module(node, module)
    if node.op == "call_method":
        return _of_method(node)
    if node.op == "call_function":
        return _of_function(node, node.target, node.args[1:], dict(node.kwargs))
    return Step("other", node)


def _of_module(node: fx.Node, module: nn.Module) -> Step:
    kind = type(module)
    why_not = oddity(module)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        return Step("conv", node, module, why_not=extras_of(module) or why_not)
    if kind is nn.BatchNorm2d:
        return Step("bn", node, module, why_not=why_not)
    if isinstance(module, nn.ReLU) and kind is nn.ReLU:
        return Step("relu", node, module, in_place=module.inplace, why_not=why_not)
    if kind in (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d):
        return _of_pool(node, module, why_not, own=True)
    if kind in RISING and RISING[kind](module):
        return Step("rising", node, module, why_not=why_not)
    return Step("other", node, module, why_not=_looks_like(module))


def _looks_like(module: nn.Module) -> str:
    """Why a module that resembles a link of a chain is none."""
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm takes its statistics from all processes"
    if isinstance(module, NOT_FUSED_ACTIVATIONS):
        return f"{type(module).__name__} is not fused"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it has parametrisations"
    if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.MaxPool2d | nn.AvgPool2d):
        return f"{type(module).__module__}.{type(module).__name__} may do something of its own"
    return ""


def _of_pool(node: fx.Node, module: nn.Module, why_not: str, own: bool) -> Step:
    mine = module if own else None
    if isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        size = module.output_size
        pair = (size, size) if size is None or isinstance(size, int) else tuple(size)
        if getattr(module, "return_indices", False):
            why_not = why_not or "return_indices=True"
        name = "avg" if isinstance(module, nn.AdaptiveAvgPool2d) else "max"
        return Step("pool", node, mine, Window(None, name, (1, 1), (1, 1)), pair, why_not=why_not)  # type: ignore[arg-type]
    try:
        options = pooling_of(module)
        window = Window.checked(**options, activation=None)
    except ValueError as error:
        return Step("pool", node, mine, Window(None), why_not=why_not or str(error))
    return Step("pool", node, mine, window, why_not=why_not)


def _of_method(node: fx.Node) -> Step:
    if node.target in ("relu", "relu_") and len(node.args) == 1 and not node.kwargs:
        return Step("relu", node, in_place=node.target == "relu_")
    return Step("other", node)


def _of_function(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    kwargs.pop("input", None)
    if target in NOT_FUSED_FUNCTIONS:
        return Step("other", node, why_not=f"{target.__name__} is not fused")
    if any(isinstance(value, fx.Node) for value in (*args, *kwargs.values())):
        return Step("other", node)
    if target in RELU_FUNCTIONS:
        in_place = target in (F.relu_, torch.relu_) or bool(args[0] if args else kwargs.get("inplace", False))
        return Step("relu", node, in_place=in_place)
    if target is F.leaky_relu:
        slope = args[0] if args else kwargs.get("negative_slope", 0.01)
        return Step("rising" if slope >= 0 else "other", node)
    if target in RISING_FUNCTIONS:
        return Step("rising", node)
    if target not in POOL_FUNCTIONS:  # F.max_pool2d dispatches to one of two functions, each with its name
        target = POOL_NAMES.get(getattr(target, "__name__", ""))
    if target is None:
        return Step("other", node)
    kind, names = POOL_FUNCTIONS[target]
    bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    if bound.get("stride") in ([], ()):  # what torch.max_pool2d calls no stride
        bound["stride"] = None
    return _of_pool(node, kind(**bound), "", own=False)
