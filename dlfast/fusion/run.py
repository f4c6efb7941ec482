"""One chain of a fused model at work: a fused operator while its layers are what they were, else the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlfast.functional import relu_pool2d
from dlfast.functional.batch_norm_relu_pool import DTYPES
from dlfast.functional.window import Window
from dlfast.fusion.generate import Source, compiled
from dlfast.fusion.layers import Link
from dlfast.fusion.sizes import convolved, ordinary
from dlfast.nn.batch_norm import convolve_and_normalise, normalise
from dlfast.nn.conv import convolve
from dlfast.nn.folding import Fold
from dlfast.nn.plain import HOOKS

AdaptiveSize = tuple[int | None, int | None]
Sources = Mapping[bool, Source | None]  # by the mode of the module
Code = Callable[[nn.Module, Any], Any]  # (module, input) -> output


class NotFusedWarning(UserWarning):
    """A model, or a chain of its layers, runs as plain PyTorch; the message says why."""


class Run:
    """What generated code calls in place of some nodes: of a chain, or of a call and the pooling after it.

    `links` are the layers that it looks at before it takes their place, `plain` is what runs otherwise.
    """

    def __init__(self, name: str, links: list[Link], plain: Sources) -> None:
        self.name = name
        self.links = links
        self._plain = dict(plain)
        self._said: set[str] = set()
        self._compile()

    def _compile(self) -> None:
        self._run_plain = self._codes(self._plain)

    def _codes(self, sources: Sources) -> dict[bool, Code]:
        return {mode: compiled(source, {}, f"<{self.name}>") for mode, source in sources.items() if source is not None}

    def plainly(self, module: nn.Module, input: Any) -> Any:
        """The layers and functions, one by one."""
        return self._run_plain[bool(module.training)](module, input)

    def holds(self, module: nn.Module) -> bool:
        """Whether the layers are what they were; says once what has changed."""
        if torch.compiler.is_compiling():  # the forward has looked at all of them: FusedForward._held
            return all(link.holds_traced() for link in self.links)
        for link in self.links:
            if not link.holds(module):
                self._say(module, link.change(module))
                return False
        return True

    def _say(self, module: nn.Module, change: str) -> None:
        if change not in self._said:
            self._said.add(change)
            warnings.warn(
                f"the fused chain at {self.name!r} of {type(module).__name__} runs as plain PyTorch: {change}",
                NotFusedWarning, stacklevel=5,
            )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_run_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()


class ChainRun(Run):
    """A chain: a convolution, a normalisation or both, ReLU and pooling, as one operator.

    `conv` and `bn` are the layers whose parameters the operator takes, `others` the further layers of the chain.
    `after` is what stands between the operator's parts and runs after it (LeakyReLU, Dropout2d ...).
    """

    def __init__(
        self,
        name: str,
        conv: Link | None,
        bn: Link | None,
        others: list[Link],
        window: Window,
        adaptive: AdaptiveSize | None,
        plain: Sources,
        after: Sources,
    ) -> None:
        self.conv, self.bn = conv, bn
        self.window, self.adaptive = window, adaptive
        self._options = window.options()
        self._dropouts = [link for link in others if link.kind is nn.Dropout2d]
        self.fold = Fold()
        self._after = dict(after)
        super().__init__(name, [link for link in (conv, bn, *others) if link is not None], plain)

    def _compile(self) -> None:
        super()._compile()
        self._run_after = self._codes(self._after)

    def __call__(self, module: nn.Module, input: Any) -> Any:
        if not self.holds(module) or not self._takes(input):
            return self.plainly(module, input)
        output = self._fused(input)
        after = self._run_after.get(bool(module.training))
        return output if after is None else after(module, output)

    def _takes(self, input: Any) -> bool:
        """Whether the operator means the same for this input; what it does not take PyTorch computes, or refuses."""
        if type(input) is not Tensor and type(input) is not nn.Parameter:
            return False
        if input.dim() != 4 and (input.dim() != 3 or self.bn is not None):
            return False
        # Without a batch Dropout2d zeroes rows: not the same before a maximum and after it.
        if self._dropouts and input.dim() == 3 and any(link.layer.training for link in self._dropouts):
            return False
        if self.conv is not None:
            weight, _ = _weight_and_bias(self.conv.layer)
            if type(weight) is not nn.Parameter and type(weight) is not Tensor:
                return False
        return input.dtype in DTYPES and input.layout is torch.strided

    def _fused(self, input: Tensor) -> Tensor:
        conv: Any = None if self.conv is None else self.conv.layer
        bn: Any = None if self.bn is None else self.bn.layer
        window = self.window
        if conv is None:
            return relu_pool2d(input, **self._options) if bn is None else normalise(bn, input, window)
        if bn is not None:
            return convolve_and_normalise(conv, bn, input, window, self.fold)
        weight, bias = _weight_and_bias(conv)
        if self.adaptive is None:
            return convolve(conv, input, weight, bias, self._options)
        size = ordinary(self.adaptive, tuple(convolved(conv, input.shape)[-2:]))
        if size is None:
            z = convolve(conv, input, weight, bias, replace(window, pool=None).options())
            return pool(z, window, self.adaptive)
        return convolve(conv, input, weight, bias, replace(window, pool_size=size, pool_stride=size).options())


def _weight_and_bias(conv: nn.Module) -> tuple[Any, Any]:
    """Read as `nn.Module` reads them, which takes longer than the rest of a look at a layer."""
    own = conv._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return conv.weight, conv.bias


class PooledChainRun(ChainRun):
    """The last chain of a forward, with the pooling that follows the call of that forward."""

    def plainly(self, module: nn.Module, input: Any) -> Any:
        return pool(super().plainly(module, input), self.window, self.adaptive)


class PooledCall(Run):
    """The call of a module that ends in a chain, and the pooling after it, which that chain then takes."""

    def __init__(self, name: str, path: str, kind: type[nn.Module], links: list[Link], plain: Sources) -> None:
        self.path = tuple(path.split("."))
        self.kind = kind
        super().__init__(name, links, plain)

    def __call__(self, module: nn.Module, input: Any) -> Any:
        callee: Any = module
        for name in self.path:
            callee = callee._modules[name]
        forward = callee.__dict__.get("forward")
        if self._may_enter(callee) and getattr(forward, "takes_pool", False) and self.holds(module):
            return forward.pooled(input)
        return self.plainly(module, input)

    def _may_enter(self, callee: nn.Module) -> bool:
        """Whether nobody would miss the call of `callee` itself."""
        if type(callee) is not self.kind or callee._compiled_call_impl is not None:
            return False
        return not any(getattr(callee, name) for name in HOOKS)


def pool(input: Tensor, window: Window, adaptive: AdaptiveSize | None) -> Tensor:
    """The pooling of `window`, by PyTorch."""
    if adaptive is not None:
        adapted = F.adaptive_max_pool2d if window.pool == "max" else F.adaptive_avg_pool2d
        output: Tensor = adapted(input, adaptive)  # type: ignore[arg-type]
        return output
    pooled = F.max_pool2d if window.pool == "max" else F.avg_pool2d
    return pooled(input, window.pool_size, window.pool_stride, window.pool_padding, ceil_mode=window.ceil_mode)
