"""Modes of PyTorch in which its own operators must run."""

from __future__ import annotations

import torch
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
