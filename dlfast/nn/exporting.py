"""Whether a model is being turned into a graph for another program to run."""

from __future__ import annotations

import torch


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
