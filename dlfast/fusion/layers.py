"""What a layer of PyTorch's must be, and stay, so that a fused operator may do its work.

The layers of a fused chain are not touched: whoever finds them by name or by type finds what was there before, and
may do to them what one does to layers. So each call looks at them first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from dlfast.nn.plain import HOOKS, is_as_installed, oddity

# What a fused chain has taken in of each kind of layer. Everything else it reads at each call, or runs the layer.
OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: (),
    nn.BatchNorm2d: (),
    nn.ReLU: ("inplace",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.LeakyReLU: ("negative_slope",),
    nn.ReLU6: (),
    nn.Hardtanh: (),
    nn.Sigmoid: (),
    nn.Tanh: (),
    nn.Dropout2d: (),
    nn.Identity: (),
}
NOTHING: dict[str, Any] = {}  # what hooks and children must equal


def layer_at(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """The layer at `path` from `module` as it is now, or None."""
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


class Link:
    """A layer of a fused chain, found by its path from the module that calls it.

    It is held weakly: a layer that somebody has replaced is gone, and not copied with the model.
    """

    def __init__(self, path: str, layer: nn.Module) -> None:
        self.path = tuple(path.split("."))
        self._layer: Callable[[], nn.Module | None] = weakref.ref(layer)
        self.kind = type(layer)
        self.options = {name: getattr(layer, name) for name in OPTIONS[self.kind]}
        self._seen: dict[str, Any] | None = None

    @property
    def layer(self) -> nn.Module:
        """The layer, which must be there: `holds` tells."""
        layer = self._layer()
        assert layer is not None
        return layer

    def holds(self, module: nn.Module) -> bool:
        """Whether the layer is what it was; costs about a microsecond.

        What `change` has looked at is kept with the attributes that it has seen, which one comparison finds again:
        most of them are the same objects, those of the hooks must be empty.
        """
        layer = self._layer()
        if layer is None or type(layer) is not self.kind or self._found(module) is not layer:
            return False
        try:
            if layer.__dict__ == self._seen:
                return is_as_installed(self.kind)
        except Exception:  # somebody's attribute that cannot be compared
            pass
        if self.change(module):
            return False
        self._seen = {**layer.__dict__, **dict.fromkeys(HOOKS, NOTHING), "_modules": NOTHING}
        return True

    def change(self, module: nn.Module) -> str:
        """What has changed since the model was fused; empty where nothing has that matters."""
        where = ".".join(self.path)
        found = self._found(module)
        if found is None or found is not self._layer():
            return f"{where} is another layer now ({'none' if found is None else type(found).__name__})"
        if type(self.layer) is not self.kind:
            return f"{where} is a {type(self.layer).__name__} now"
        for name, value in self.options.items():
            if getattr(self.layer, name, None) != value:
                return f"{where}.{name} was {value!r} and is {getattr(self.layer, name, None)!r} now"
        odd = oddity(self.layer)
        return f"{where}: {odd}" if odd else ""

    def holds_traced(self) -> bool:
        """The part of `change` that ``torch.compile`` can follow, so that it compiles anew when an option changes."""
        return all(getattr(self.layer, name) == value for name, value in self.options.items())

    def _found(self, module: nn.Module) -> nn.Module | None:
        return layer_at(module, self.path)

    def forget_unless_found(self, module: nn.Module) -> None:
        """Before a copy is made, which must not hold what is no longer a part of `module`."""
        if self._found(module) is not self._layer():
            self._layer = _gone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None, "_layer": self._layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        layer = state["_layer"]
        self._layer = _gone if layer is None else weakref.ref(layer)


def _gone() -> None:
    """A weak reference to nothing, that can be copied."""
