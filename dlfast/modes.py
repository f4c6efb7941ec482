"""Modes of PyTorch in which its own operators must run, and what our layers are to a tracer."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad


def is_exporting() -> bool:
    """True in ``torch.export`` and ``torch.onnx.export``: there the layers give PyTorch's own operators, so that
    what comes out runs where dlfast is not installed.

    >>> is_exporting()
    False
    """
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
        return False
    return torch.onnx.is_in_onnx_export()  # the exporter that traces


def is_transformed() -> bool:
    """Whether something looks inside of operators that bring their own autograd: ``torch.func`` (grad, vmap, jvp ...),
    or forward-mode differentiation (dual tensors).

    >>> is_transformed()
    False
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def as_leaf(layer: nn.Module, input: Tensor) -> Tensor | None:
    """The call of `layer` as one node where ``torch.fx`` traces the module around it, as of a layer of PyTorch's.

    None where nobody traces, or where `layer` itself is what is traced.
    """
    if not isinstance(input, fx.Proxy):
        return None
    tracer = input.tracer
    if not isinstance(tracer, fx.Tracer) or tracer.root is layer:
        return None
    node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})
    return node
