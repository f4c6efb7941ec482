"""Batch normalisation, ReLU and pooling as one pass; with the convolution before them, folded in evaluation."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from dlfast._native import runs_on
from dlfast.functional import relu_pool2d
from dlfast.functional.arguments import Size2
from dlfast.functional.batch_norm_relu_pool import normalised
from dlfast.functional.modes import is_exporting
from dlfast.functional.prepared import conv_norm_block
from dlfast.functional.window import Window
from dlfast.nn.conv import ConvReLUPool2d, convolve
from dlfast.nn.folding import Fold
from dlfast.nn.leaf import as_leaf

# Nothing after the convolution itself, whose algorithm is chosen all the same.
CONVOLUTION = Window(activation=None, pool=None)

Self = TypeVar("Self", bound="ConvBNReLUPool2d")


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Whether `bn` normalises with the statistics of the batch, as its own forward decides."""
    return bn.training or (bn._buffers["running_mean"] is None and bn.running_var is None)


def _running(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that a call uses or moves."""
    if bn.training and not bn.track_running_stats:
        return None, None
    return bn.running_mean, bn.running_var


def _counter(bn: nn.BatchNorm2d) -> Tensor | None:
    """What counts the batches, where a call does."""
    return bn.num_batches_tracked if bn.training and bn.track_running_stats else None


def _momentum(bn: nn.BatchNorm2d, batches: float) -> float:
    """How far the running statistics move; None asks for their average over `batches`."""
    if bn.momentum is not None:
        return bn.momentum
    return 1.0 / batches if batches else 0.0


def normalise(bn: nn.BatchNorm2d, input: Tensor, window: Window) -> Tensor:
    """What `bn` does to `input` in its present mode, its running statistics included, then `window`."""
    counter = _counter(bn)
    if counter is not None:
        counter.add_(1)
    momentum = _momentum(bn, 0.0 if bn.momentum is not None or counter is None else float(counter))
    return normalised(
        input, *_running(bn), bn.weight, bn.bias, uses_batch_statistics(bn), momentum, bn.eps, window
    )  # fmt: skip


def _as_one(conv: nn.Conv2d, bn: nn.BatchNorm2d, input: Tensor, window: Window) -> Tensor | None:
    """What `conv` and `bn`, with the statistics of the batch, and `window` make of `input` as one operator; None where
    that does not take them."""
    if type(conv.padding) is str or conv.padding_mode != "zeros" or torch.compiler.is_compiling():
        return None
    tensors = (input, conv.weight, conv.bias, *_running(bn), bn.weight, bn.bias)
    if not runs_on(input.device) or has_torch_function(tensors):
        return None
    block = conv_norm_block(
        conv.stride, conv.padding, conv.dilation, conv.groups, window.activation, window.pool, window.pool_size,
        window.pool_stride, window.pool_padding, window.ceil_mode,
    )  # fmt: skip
    counter = _counter(bn)
    momentum = _momentum(bn, 0.0 if bn.momentum is not None or counter is None else float(counter) + 1)
    output: Tensor | None = block(*tensors, momentum, bn.eps)
    if output is not None and counter is not None:
        counter.add_(1)
    return output


def convolve_and_normalise(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, input: Tensor, window: Window, fold: Fold
) -> Tensor:  # fmt: skip
    """What `conv`, `bn` in its present mode and `window` make of `input`; in evaluation folded, where `fold` allows."""
    if not is_exporting():
        if uses_batch_statistics(bn):
            output = _as_one(conv, bn, input, window)
            if output is not None:
                return output
        elif (folded := fold.tensors(conv, bn)) is not None:
            return convolve(conv, input, *folded, window.options())
    return normalise(bn, convolve(conv, input, conv.weight, conv.bias, CONVOLUTION.options()), window)


class BNReLUPool2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` followed by ReLU and 2-d pooling, as one pass over its input.

    Parameters, buffers, running statistics and ``state_dict`` keys are those of ``nn.BatchNorm2d``. Backward
    keeps the input and one byte per pooled element, neither the normalised values nor the ReLU's output.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in
            :class:`torch.nn.BatchNorm2d`.
        pool, pool_size, pool_stride, pool_padding, ceil_mode, activation: as in
            :class:`dlfast.nn.ConvReLUPool2d`.

    Shape:
        - input: :math:`(N, C, H, W)`
        - output: as of the pooling

    Raises:
        ValueError: an argument is outside what is accepted; (in the call, in training) one value per channel.

    >>> import torch, dlfast
    >>> layer = dlfast.nn.BNReLUPool2d(8)
    >>> layer(torch.randn(4, 8, 10, 10)).shape
    torch.Size([4, 8, 5, 5])
    >>> list(layer.state_dict()) == list(torch.nn.BatchNorm2d(8).state_dict())
    True
    """

    window: Window

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        pool: str | None = "max",
        pool_size: Size2 = 2,
        pool_stride: Size2 | None = None,
        pool_padding: Size2 = 0,
        ceil_mode: bool = False,
        activation: str | None = "relu",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.window = Window.checked(pool, pool_size, pool_stride, pool_padding, ceil_mode, activation)

    @property
    def qconfig(self) -> Any:
        """What ``torch.ao.quantization`` attaches to layers.

        Raises:
            RuntimeError: ``convert_sync_batchnorm`` asks for it. That takes every subclass of the normalisations for
                one of them, and asks each for what no other code asks for where it is not set; ReLU and pooling
                would be lost without a word.
        """
        # Nothing else tells: whatever it asks of a layer others ask as well, isinstance and named_children included,
        # and to whoever else looks for qconfig, with hasattr, the answer must be no.
        if sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise RuntimeError(
                "BNReLUPool2d cannot become a SyncBatchNorm: use nn.SyncBatchNorm, nn.ReLU and the pooling layer"
            )
        try:
            return self.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("'BNReLUPool2d' object has no attribute 'qconfig'") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]

    def forward(self, input: Tensor) -> Tensor:
        node = as_leaf(self, input)
        if node is not None:
            return node
        self._check_input_dim(input)
        return normalise(self, input, self.window)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.window}"  # type: ignore[no-untyped-call]


class ConvBNReLUPool2d(ConvReLUPool2d):
    """Convolution, batch normalisation, ReLU and 2-d pooling in one layer.

    In training the convolution's output is kept, and one pass normalises it, applies the ReLU and pools;
    backward keeps beside that output one byte per pooled element. In evaluation the normalisation is folded
    into the weight and the bias of the convolution: when first needed, and again when one of them has
    changed (on other devices than the CPU, a change through ``.data`` is seen after ``train()`` or ``eval()``).
    Where gradients of the parameters are asked for in evaluation, nothing is folded.

    Its own are ``weight`` and ``bias``; its child ``bn`` is a :class:`torch.nn.BatchNorm2d`. With hooks on that, or
    another layer in its place (``nn.SyncBatchNorm``), that layer runs by itself.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as in :class:`torch.nn.Conv2d`.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        pool, pool_size, pool_stride, pool_padding, ceil_mode, activation: as in
            :class:`dlfast.nn.ConvReLUPool2d`.

    Shape:
        - input: :math:`(N, C, H, W)`
        - output: as of the convolution and the pooling one after the other

    Raises:
        ValueError: an argument is outside what is accepted; (in the call) input of other than four dimensions;
            (in the call, in training) one value per channel.
        RuntimeError: (in the call) shapes, dtypes or devices do not fit.

    >>> import torch, dlfast
    >>> layer = dlfast.nn.ConvBNReLUPool2d(3, 16, 3, padding=1, bias=False)
    >>> layer(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 16, 16, 16])
    >>> list(layer.state_dict())
    ['weight', 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']
    """

    bn: nn.BatchNorm2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 | str = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        pool: str | None = "max",
        pool_size: Size2 = 2,
        pool_stride: Size2 | None = None,
        pool_padding: Size2 = 0,
        ceil_mode: bool = False,
        activation: str | None = "relu",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype, pool=pool, pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding,
            ceil_mode=ceil_mode, activation=activation,
        )  # fmt: skip
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)

    @classmethod
    def from_modules(  # type: ignore[override]
        cls: type[Self],
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        pool: nn.MaxPool2d | nn.AvgPool2d | None = None,
        *,
        activation: str | None = "relu",
    ) -> Self:
        """The layer that does what `conv`, `bn`, ReLU and `pool` do one after the other.

        It shares `conv`'s parameters and has `bn` itself as its child.

        Raises:
            TypeError: `conv` is not a plain ``nn.Conv2d``, `bn` not a plain ``nn.BatchNorm2d``, or `pool`
                neither ``nn.MaxPool2d`` nor ``nn.AvgPool2d``.
            ValueError: as :meth:`ConvReLUPool2d.from_modules`.

        >>> import torch, dlfast
        >>> conv, bn = torch.nn.Conv2d(3, 8, 5), torch.nn.BatchNorm2d(8)
        >>> layer = dlfast.nn.ConvBNReLUPool2d.from_modules(conv, bn, torch.nn.MaxPool2d(2))
        >>> layer.bn is bn
        True
        """
        if type(bn) is not nn.BatchNorm2d:
            raise TypeError(f"bn must be a plain nn.BatchNorm2d, got {type(bn).__name__}")
        layer = super().from_modules(conv, pool, activation=activation)
        layer.bn = bn
        layer.train(conv.training)
        return layer

    def train(self: Self, mode: bool = True) -> Self:
        """As of every module; also drops the folded weight, which is made anew when it is needed."""
        self._fold().drop()
        return super().train(mode)

    def _fold(self) -> Fold:
        fold: Fold = self.__dict__.setdefault("_folded", Fold())
        return fold

    def forward(self, input: Tensor) -> Tensor:
        node = as_leaf(self, input)
        if node is not None:
            return node
        bn = self.bn
        if type(bn) is not nn.BatchNorm2d or bn._forward_hooks or bn._forward_pre_hooks or "forward" in bn.__dict__:
            z = convolve(self, input, self.weight, self.bias, CONVOLUTION.options())
            return relu_pool2d(bn(z), **self._window_options())
        bn._check_input_dim(input)
        return convolve_and_normalise(self, bn, input, self.window, self._fold())
