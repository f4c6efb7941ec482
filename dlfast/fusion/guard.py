"""A forward that looks, at each call, whether its module is still what was fused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import CodeType
from typing import Any

from torch import nn

from dlfast.fusion.source import value_at

FORWARD = "_dlfast_forward"
REPLICATE = "_replicate_for_data_parallel"


class GuardedForward:
    """The forward of `module`, which refuses to run when what was decided by no longer holds.

    It stands on the instance, in front of the class's own forward: the class, its other methods, its children
    and their names stay what they are. `flags` are attributes of the module that decide which layers its forward
    calls, `layers` the layers of its chains, both by their path from the module.
    """

    def __init__(self, module: nn.Module, flags: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> None:
        self.module = module
        self.flags = [(tuple(path.split(".")), value) for path, value in flags.items()]
        self.layers = [(tuple(path.split(".")), layer) for path, layer in layers.items()]

    def check(self) -> None:
        """Refuse what was changed.

        Raises:
            RuntimeError: a flag has another value, or another layer stands in the place of one of a chain.
        """
        module = self.module
        for parts, value in self.flags:
            now = value_at(module, parts)
            if now != value:
                raise RuntimeError(
                    f"{type(module).__name__}.{'.'.join(parts)} was {value!r} when the model was fused and is now "
                    f"{now!r}: call dlfast.unfuse first, change it, and fuse again"
                )
        for parts, layer in self.layers:
            there: Any = module
            for part in parts:
                there = None if there is None else there._modules.get(part)
            if there is not layer:
                raise RuntimeError(
                    f"{type(module).__name__}.{'.'.join(parts)} is not the layer that was fused, but "
                    f"{'missing' if there is None else type(there).__name__}: call dlfast.unfuse first, replace it, "
                    "and fuse again"
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:
        """Where torch.export looks for the code that runs."""
        code: CodeType = type(self.module).forward.__code__
        return code


def guard(module: nn.Module, forward: GuardedForward) -> None:
    """Put `forward` in front of the forward of `module`."""
    module.__dict__["forward"] = module.__dict__[FORWARD] = forward
    module.__dict__[REPLICATE] = _refuse_replica


def is_guarded(module: nn.Module) -> bool:
    """Whether `module` was given a forward of its own."""
    return FORWARD in module.__dict__


def unguard(module: nn.Module) -> None:
    """Undo :func:`guard`."""
    for name in ("forward", FORWARD, REPLICATE):
        del module.__dict__[name]


def _refuse_replica() -> nn.Module:
    """In a replica on another device the forward, and a convolution's normalisation, would be the original's."""
    raise RuntimeError(
        "a fused model cannot be replicated by nn.DataParallel: use nn.parallel.DistributedDataParallel, or call "
        "dlfast.unfuse first"
    )
