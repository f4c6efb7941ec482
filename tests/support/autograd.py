"""What autograd keeps."""

from __future__ import annotations

import torch


def saved_bytes(function, *tensors) -> tuple[int, torch.Tensor]:
    """Bytes that autograd keeps for backward beyond the given tensors, one count per storage."""
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in tensors}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function(*tensors)
    return sum(kept.values()), output
