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
    return not torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
