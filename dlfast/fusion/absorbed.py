"""What is left of layers whose work a fused layer does: they hand on what they are given.

They keep everything else (parameters, buffers, ``state_dict`` keys, names, mode) and become themselves again
in :func:`dlfast.unfuse`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dlfast.fusion.gain import convolved, ordinary
from dlfast.nn.batch_norm import BNReLUPool2d, ConvBNReLUPool2d, StaysBatchNorm2d
from dlfast.nn.conv import ConvReLUPool2d
from dlfast.nn.relu_pool import ReLUPool2d

PLAIN = "_dlfast_plain"


@dataclass
class Plain:
    """What a module was before: its class, and its attributes that were added or hidden since."""

    kind: type[nn.Module]
    fused: type[nn.Module]  # what it was made
    added: list[str]
    hidden: dict[str, Any] = field(default_factory=dict)


class Absorbed(nn.Module):
    """A layer without parameters, as a part of the fused layer before it, which has its options."""

    def __setattr__(self, name: str, value: Any) -> None:
        options = () if name in ("training", "inplace") or name.startswith("_") else self.__dict__
        if name in options and self.__dict__[name] != value:
            raise RuntimeError(
                f"{name} of a {self.__dict__[PLAIN].kind.__name__} that is part of a fused layer cannot be changed: "
                "call dlfast.unfuse first, change it, and fuse again"
            )
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        return input

    def _get_name(self) -> str:
        return f"Absorbed {self.__dict__[PLAIN].kind.__name__}"


class AbsorbedBatchNorm2d(StaysBatchNorm2d):
    """A normalisation whose parameters, statistics and mode the fused convolution before it uses."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class PooledDropout2d(nn.Dropout2d):
    """A Dropout2d before a maximum that a fused layer takes first: the same for whole channels alone."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.dim() != 4:  # there Dropout2d zeroes rows
            raise RuntimeError(
                f"Dropout2d in a fused chain: expected 4D input in training (got {input.dim()}D input): "
                "call dlfast.unfuse for input without a batch"
            )
        return super().forward(input)

    def _get_name(self) -> str:
        return "Dropout2d"


class ConvReLUAdaptivePool2d(ConvReLUPool2d):
    """A convolution block with adaptive pooling, which is an ordinary one where it divides its input evenly.

    At any other size it runs as three layers of PyTorch's.
    """

    adaptive_size: tuple[int | None, int | None]

    def forward(self, input: Tensor) -> Tensor:
        size = ordinary(self.adaptive_size, tuple(convolved(self, input.shape)[-2:]))
        if size is not None:
            window = replace(self.window, pool_size=size, pool_stride=size)
            return self._block(input, self.weight, self.bias, window.options())
        z = self._conv_forward(input, self.weight, self.bias)
        pool = F.adaptive_max_pool2d if self.pool == "max" else F.adaptive_avg_pool2d
        output: Tensor = pool(F.relu(z) if self.activation else z, self.adaptive_size)  # type: ignore[arg-type]
        return output


def swap(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Make `module`, which stays the same object with the same parameters, a `kind` with `attributes`."""
    hidden = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__.update(attributes)
    module.__dict__[PLAIN] = Plain(type(module), kind, list(attributes), hidden)
    module.__class__ = kind


def swap_back(module: nn.Module) -> None:
    """Undo :func:`swap`."""
    plain: Plain = module.__dict__.pop(PLAIN)
    for name in plain.added:
        module.__dict__.pop(name, None)
    module.__dict__.pop("_folded", None)
    module.__dict__.update(plain.hidden)
    module.__class__ = plain.kind


HEADS: dict[str, type[nn.Module]] = {
    "conv": ConvReLUPool2d,
    "conv bn": ConvBNReLUPool2d,
    "conv adaptive": ConvReLUAdaptivePool2d,
    "bn": BNReLUPool2d,
    "relu": ReLUPool2d,
}
