"""Folding a normalisation with fixed statistics into the convolution before it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    key: tuple[object, ...]
    sample: Tensor | None  # None: not on the CPU

    SAMPLED = 64

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """The folded weight and bias, made now or kept on `conv` from the last time."""
        tensors = _tensors(conv, bn)
        if not _may_keep(tensors):
            return fold(conv, bn)
        key = (bn.eps, *((t.data_ptr(), t._version, t.dtype, t.device, t.stride()) for t in tensors))
        with torch.inference_mode(False), torch.no_grad():
            sample = cls._sample_of(tensors)
            kept: Folded | None = conv.__dict__.get("_folded")
            if kept is None or kept.key != key or not _same(kept.sample, sample):
                kept = conv.__dict__["_folded"] = cls(*fold(conv, bn), key, sample)
        return kept.weight, kept.bias

    @classmethod
    def _sample_of(cls, tensors: list[Tensor]) -> Tensor | None:
        weight, *vectors = tensors
        if weight.device.type != "cpu":
            return None
        some = sample(weight.detach(), cls.SAMPLED)
        return torch.cat([some.float(), *(v.detach().float() for v in vectors)])


def sample(weight: Tensor, count: int) -> Tensor:
    """`count` elements of `weight`, or all if it has fewer, from all over its memory.

    >>> sample(torch.arange(24).view(2, 3, 4), 4)
    tensor([ 0, 13,  2, 15])
    """
    numel = weight.numel()
    reach = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True)) + 1
    if reach != numel:  # memory with gaps, or elements that share it
        weight = weight.contiguous()
    return weight.as_strided((numel,), (1,))[_places(numel, count)]


@functools.lru_cache(maxsize=256)
def _places(numel: int, count: int) -> Tensor:
    """Steps of about the golden section: they fall on all channels and taps alike, whatever the sizes are."""
    step = int(numel * 0.6180339887)
    while math.gcd(step, numel) > 1:
        step -= 1
    return torch.arange(min(count, numel), device="cpu") * step % max(numel, 1)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _may_keep(tensors: list[Tensor]) -> bool:
    """Not while somebody traces, on tensors that are not plain, or that count no versions.

    In a CUDA graph that is captured the fold is part of the graph, and its tensors belong to it.
    """
    if (
        (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    return all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in tensors)
