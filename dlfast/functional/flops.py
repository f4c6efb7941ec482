"""The floating-point operations of our operators, for ``torch.utils.flop_counter.FlopCounterMode``.

That module takes longer to import than all of dlfast, and hardly anybody uses it: what it must know it is told when
it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Give the counter its formulas, now or as soon as it is there; the operators must be loaded."""
    if COUNTER in sys.modules:
        _tell(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _tell(counter: Any) -> None:
    """Ours have as many as PyTorch's for the convolution in them."""
    of_forward = counter.flop_registry[torch.ops.aten.convolution]
    of_backward = counter.flop_registry[torch.ops.aten.convolution_backward]

    @counter.register_flop_formula(torch.ops.dlfast._conv_relu_pool2d)  # type: ignore[untyped-decorator]
    def forward(
        input: list[int], weight: list[int], bias: Any, stride: list[int], padding: list[int], dilation: list[int],
        *rest: Any, out_shape: Any,
    ) -> int:  # fmt: skip
        z = _convolved(input, weight, stride, padding, dilation)
        return int(of_forward(input, weight, bias, stride, padding, dilation, False, out_val=z))

    @counter.register_flop_formula(torch.ops.dlfast._conv_relu_pool2d_backward)  # type: ignore[untyped-decorator]
    def backward(
        grad_output: list[int], input: list[int], weight: list[int], winner_mask: Any, stride: list[int],
        padding: list[int], dilation: list[int], groups: int, activation: Any, pool: Any, pool_size: Any,
        pool_stride: Any, pool_padding: Any, ceil_mode: bool, mask: list[bool], *rest: Any, out_shape: Any,
    ) -> int:  # fmt: skip
        z = _convolved(input, weight, stride, padding, dilation)
        return int(
            of_backward(
                z, input, weight, None, stride, padding, dilation, False, [0, 0], groups, mask, out_val=out_shape
            )
        )


def _convolved(
    input: list[int], weight: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:  # fmt: skip
    """The shape of the convolution's output: FLOPs do not depend on what is pooled."""
    size = [
        (input[2 + a] + 2 * padding[a] - dilation[a] * (weight[2 + a] - 1) - 1) // stride[a] + 1 for a in (0, 1)
    ]  # fmt: skip
    return [input[0], weight[0], *size]


class _WhenImported(MetaPathFinder):
    """Finds the counter as others find it, and tells it the formulas once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_tell(module: ModuleType) -> None:
            load(module)
            _tell(module)

        spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec
