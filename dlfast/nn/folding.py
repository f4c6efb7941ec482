"""Folding a normalisation with fixed statistics into the convolution before it."""

from __future__ import annotations

from dataclasses import dataclass

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


def _tensors(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> list[Tensor]:
    tensors = [conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]
    return [tensor for tensor in tensors if tensor is not None]


def may_fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> bool:
    """Whether nobody asks for gradients that lead through the folded tensors to the parameters."""
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in _tensors(conv, bn))


@dataclass
class Folded:
    """Folded tensors, with what tells whether they still hold.

    A version counter and an address tell of every change that PyTorch's own operators, optimizers and
    ``load_state_dict`` make. What is written through ``.data`` leaves no trace there, so that on the CPU the
    vectors and a sample of the weight are compared as well. On other devices that would wait for the device in
    every layer; there ``train()`` and ``eval()``, which drop the folded tensors, tell of such a change.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    state: bytes

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """The folded weight and bias, made now or kept on `conv` from the last time."""
        tensors = _tensors(conv, bn)
        if native.module is None or not _may_keep(tensors):
            return fold(conv, bn)
        state = native.module.tensors_state(tensors)
        kept: Folded | None = conv.__dict__.get("_folded")
        if kept is None or kept.state != state or kept.eps != bn.eps:
            with torch.inference_mode(False), torch.no_grad():
                kept = conv.__dict__["_folded"] = cls(*fold(conv, bn), bn.eps, state)
        return kept.weight, kept.bias


def _may_keep(tensors: list[Tensor]) -> bool:
    """Not while somebody traces, on tensors that are not plain, or that count no versions.

    In a CUDA graph that is captured the fold is part of the graph, and its tensors belong to it.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return False
    return all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in tensors)
