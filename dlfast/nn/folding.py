"""Folding a normalisation with fixed statistics into the convolution before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dlfast._native import native


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what `conv` and then `bn`, in evaluation, do.

    Computed in float32 at least, and returned in the dtype of the convolution.
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    shift = -bn.running_mean.to(dtype) * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(dtype)
    if conv.bias is not None:
        shift = shift + conv.bias.to(dtype) * scale
    weight = conv.weight.to(dtype) * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


def _tensors(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """What a fold is made of, read as `nn.Module` reads it, which takes longer by itself than all else in a look."""
    own, affine, statistics = conv._parameters, bn._parameters, bn._buffers
    try:
        return (
            own["weight"], own["bias"], affine["weight"], affine["bias"], statistics["running_mean"],
            statistics["running_var"],
        )  # fmt: skip
    except KeyError:  # a tensor that somebody computes stands elsewhere
        return conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var


class Fold:
    """The folded tensors of one convolution and its normalisation: made when needed, kept while they are true.

    They are true of exactly these tensors at exactly these versions, which ``csrc/norm/tensors_state.h``
    proves. What is written through ``.data`` counts no version: on the CPU all vectors, weights of up to 64 KiB and a
    sample of larger ones are compared as well. On other devices that would wait for the device in every layer; there,
    and for what a sample may miss, :meth:`drop` is called by ``train()`` and ``eval()``.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget the folded tensors."""
        self._kept: tuple[Tensor, Tensor] | None = None
        self._there: list[bool] = []  # which of the tensors there were
        self._eps = 0.0
        self._state: Any = None

    def tensors(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | None:
        """The folded weight and bias, kept or made now; None where somebody asks for gradients of what they are
        made of, which lead through `conv` and `bn` themselves."""
        places = _tensors(conv, bn)
        tensors = [tensor for tensor in places if tensor is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        if native.module is None or _is_watched(tensors[0]):
            return fold(conv, bn)
        there = [tensor is not None for tensor in places]
        if self._kept is None or self._eps != bn.eps or self._there != there or not self._state.holds(tensors):
            if not all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in tensors):
                return fold(conv, bn)
            with torch.inference_mode(False), torch.no_grad():
                state = native.module.TensorsState(tensors)
                self._kept, self._there, self._eps, self._state = fold(conv, bn), there, bn.eps, state
        return self._kept

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.drop()


def _is_watched(weight: Tensor) -> bool:
    """Whether somebody traces or looks on, who must see the fold being made.

    In a CUDA graph that is captured the fold is part of the graph, and its tensors belong to it.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    )
