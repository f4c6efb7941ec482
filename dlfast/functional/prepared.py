"""Compiled operators with their options checked once and kept, called without the dispatcher.

Parsing a dozen options and asking the dispatcher twice takes longer than the kernels of a small network. These calls
are for tensors that the dispatcher would do nothing about (``csrc/core/plain.h``); for all others they answer None, and
the operator of ``torch.ops.dlfast`` is what to call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dlfast._native import native
from dlfast.functional.arguments import Size2

# Distinct blocks in use at once; a network has some tens.
KEPT = 4096


def _compiled() -> Any:
    assert native.module is not None, "only devices that compiled operators run on get here"
    return native.module


def _both(value: Size2) -> Any:
    return (value, value) if isinstance(value, int) else value


@lru_cache(maxsize=KEPT, typed=True)
def conv_block(
    stride: Size2, padding: Size2, dilation: Size2, groups: int, activation: str | None, pool: str | None,
    pool_size: Size2, pool_stride: Size2 | None, pool_padding: Size2, ceil_mode: bool,
) -> Any:  # fmt: skip
    """``conv_relu_pool2d`` with these options: a call with input, weight and bias.

    Raises:
        TypeError: an option is not of a type that the operator takes, or cannot be kept (a list).
        RuntimeError: an option is outside what is accepted.
        ValueError: ``activation`` or ``pool`` is none of the accepted names.
    """
    return _compiled().ConvBlock(
        _both(stride), _both(padding), _both(dilation), groups, activation, pool, _both(pool_size),
        _both(pool_size if pool_stride is None else pool_stride), _both(pool_padding), ceil_mode,
    )  # fmt: skip


@lru_cache(maxsize=KEPT)
def norm_block(
    activation: str | None, pool: str | None, pool_size: Size2, pool_stride: Size2, pool_padding: Size2,
    ceil_mode: bool,
) -> Any:  # fmt: skip
    """``batch_norm_relu_pool2d`` with this window, which has been checked: a call with input, running statistics,
    weight, bias, training, momentum and eps."""
    return _compiled().NormBlock(activation, pool, pool_size, pool_stride, pool_padding, ceil_mode)


@lru_cache(maxsize=KEPT, typed=True)
def conv_norm_block(
    stride: Size2, padding: Size2, dilation: Size2, groups: int, activation: str | None, pool: str | None,
    pool_size: Size2, pool_stride: Size2, pool_padding: Size2, ceil_mode: bool,
) -> Any:  # fmt: skip
    """A convolution and ``batch_norm_relu_pool2d`` in training as one: a call with input, weight and bias of the
    convolution, running statistics, weight and bias of the normalisation, momentum and eps.

    Raises:
        TypeError: an option of the convolution is not of a type that it takes.
        RuntimeError: an option is outside what is accepted.
    """
    convolution = conv_block(stride, padding, dilation, groups, None, None, 1, 1, 0, False)
    window = norm_block(activation, pool, pool_size, pool_stride, pool_padding, ceil_mode)
    return _compiled().ConvNormBlock(convolution, window)
