"""`nn.Conv2d` with the ReLU and the pooling that follow it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from dlfast import reference
from dlfast.functional import conv_relu_pool2d
from dlfast.functional.arguments import Size2, pair
from dlfast.functional.modes import is_exporting
from dlfast.functional.window import Window
from dlfast.nn.leaf import as_leaf
from dlfast.nn.plain import oddity

Self = TypeVar("Self", bound="ConvReLUPool2d")


class ConvReLUPool2d(nn.Conv2d):
    """Convolution, ReLU and 2-d pooling in one layer.

    It is an :class:`torch.nn.Conv2d` (same parameters, same initialisation under the same seed, same
    ``state_dict`` keys), followed by ``activation`` and by pooling with the arguments of
    :class:`torch.nn.MaxPool2d` or :class:`torch.nn.AvgPool2d`. Backward needs of the windows only one byte
    per pooled element; see :func:`dlfast.conv_relu_pool2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as in :class:`torch.nn.Conv2d`.
        pool: "max", "avg" or None.
        pool_size: size of the pooling window.
        pool_stride: its stride; None means ``pool_size``.
        pool_padding: padding of the pooling, at most half of ``pool_size``.
        ceil_mode: round the output size up instead of down.
        activation: "relu" or None.

    Shape:
        - input: :math:`(N, C, H, W)` or :math:`(C, H, W)`, of the dtype of the parameters
        - output: as of the convolution and the pooling one after the other

    Raises:
        ValueError: an argument is outside what is accepted.
        RuntimeError: (in the call) shapes, dtypes or devices do not fit.

    >>> import torch, dlfast
    >>> layer = dlfast.nn.ConvReLUPool2d(1, 32, 3, padding=1)
    >>> layer(torch.randn(8, 1, 28, 28)).shape
    torch.Size([8, 32, 14, 14])
    >>> layer
    ConvReLUPool2d(1, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), activation='relu', pool='max', pool_size=(2, 2))
    >>> plain = torch.nn.Conv2d(1, 32, 3, padding=1)
    >>> plain.load_state_dict(layer.state_dict())
    <All keys matched successfully>
    """  # noqa: E501

    activation: str | None
    pool: str | None
    pool_size: tuple[int, int]
    pool_stride: tuple[int, int]
    pool_padding: tuple[int, int]
    ceil_mode: bool

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
        pool: str | None = "max",
        pool_size: Size2 = 2,
        pool_stride: Size2 | None = None,
        pool_padding: Size2 = 0,
        ceil_mode: bool = False,
        activation: str | None = "relu",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._set_pooling(pool, pool_size, pool_stride, pool_padding, ceil_mode, activation)

    def _set_pooling(
        self,
        pool: str | None,
        pool_size: Size2,
        pool_stride: Size2 | None,
        pool_padding: Size2,
        ceil_mode: bool,
        activation: str | None,
    ) -> None:
        window = Window.checked(pool, pool_size, pool_stride, pool_padding, ceil_mode, activation)
        for name, value in window.options().items():
            setattr(self, name, value)

    @property
    def window(self) -> Window:
        """Activation and pooling as one value."""
        return Window(**self._window_options())

    def _window_options(self) -> dict[str, Any]:
        """``window.options()``, which every call needs, without making the value between."""
        return {name: getattr(self, name) for name in Window.NAMES}

    @classmethod
    def from_modules(
        cls: type[Self],
        conv: nn.Conv2d,
        pool: nn.MaxPool2d | nn.AvgPool2d | None = None,
        *,
        activation: str | None = "relu",
    ) -> Self:
        """The layer that does what `conv`, ReLU and `pool` do one after the other, sharing `conv`'s parameters.

        Raises:
            TypeError: `conv` is not a plain ``nn.Conv2d``, or `pool` neither ``nn.MaxPool2d`` nor
                ``nn.AvgPool2d``.
            ValueError: `conv` has hooks, or parameters or buffers of its own (weight_norm, pruning), that the
                new layer would not have; or `pool` uses an option that has no fused counterpart
                (``return_indices``, ``dilation``, ``divisor_override``, ``count_include_pad=False`` with padding).

        >>> import torch, dlfast
        >>> conv, pool = torch.nn.Conv2d(3, 8, 5), torch.nn.MaxPool2d(2)
        >>> layer = dlfast.nn.ConvReLUPool2d.from_modules(conv, pool)
        >>> layer.weight is conv.weight
        True
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(f"conv must be a plain nn.Conv2d, got {type(conv).__name__}")
        _refuse_extras(conv)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.__dict__.update({k: v for k, v in conv.__dict__.items() if not k.startswith("_")})
        layer._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        layer.weight = conv.weight
        layer.register_parameter("bias", conv.bias)  # type: ignore[arg-type]
        layer._set_pooling(**pooling_of(pool), activation=activation)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        node = as_leaf(self, input)
        return convolve(self, input, self.weight, self.bias, self._window_options()) if node is None else node

    def extra_repr(self) -> str:
        conv = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{conv}, {self.window}"


class ConvReLU2d(ConvReLUPool2d):
    """:class:`ConvReLUPool2d` without pooling: the convolution with its ReLU.

    >>> import torch, dlfast
    >>> dlfast.nn.ConvReLU2d(3, 64, 3, padding=1)(torch.randn(4, 3, 32, 32)).shape
    torch.Size([4, 64, 32, 32])
    """

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
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype, pool=None,
        )  # fmt: skip

    @classmethod
    def from_modules(cls, conv: nn.Conv2d) -> ConvReLU2d:  # type: ignore[override]
        """The layer that does what `conv` and ReLU do one after the other, sharing `conv`'s parameters."""
        return super().from_modules(conv, None)


class ConvPool2d(ConvReLUPool2d):
    """:class:`ConvReLUPool2d` without ReLU: the convolution with its pooling.

    >>> import torch, dlfast
    >>> dlfast.nn.ConvPool2d(1, 32, 3, padding=1, pool="avg")(torch.randn(4, 1, 28, 28)).shape
    torch.Size([4, 32, 14, 14])
    """

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
        pool: str = "max",
        pool_size: Size2 = 2,
        pool_stride: Size2 | None = None,
        pool_padding: Size2 = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype, pool=pool, pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding,
            ceil_mode=ceil_mode, activation=None,
        )  # fmt: skip

    @classmethod
    def from_modules(cls, conv: nn.Conv2d, pool: nn.MaxPool2d | nn.AvgPool2d) -> ConvPool2d:  # type: ignore[override]
        """The layer that does what `conv` and `pool` do one after the other, sharing `conv`'s parameters."""
        return super().from_modules(conv, pool, activation=None)


def convolve(
    conv: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, window: dict[str, Any]
) -> Tensor:  # fmt: skip
    """What `conv`, with these for its weight and bias, and then a window (:meth:`Window.options`) make of `input`."""
    padding: Size2 | str = conv.padding
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    block = reference.conv_relu_pool2d if is_exporting() else conv_relu_pool2d
    return block(
        input, weight, bias, stride=conv.stride, padding=padding, dilation=conv.dilation, groups=conv.groups, **window
    )


def extras_of(conv: nn.Conv2d) -> str:
    """Why `conv` is more than its weight and bias: old-style weight_norm, pruning and the like."""
    names = {*conv._parameters, *conv._buffers}
    if names != {"weight", "bias"} or not isinstance(conv.weight, nn.Parameter):
        return f"conv must have the parameters weight and bias and no others, got {sorted(names)}"
    return ""


def _refuse_extras(conv: nn.Conv2d) -> None:
    """Hooks and reparametrisations stay behind on `conv`, so that the new layer would do something else."""
    if extras := extras_of(conv):
        raise ValueError(extras)
    odd = oddity(conv)
    if "hooks" in odd:
        raise ValueError(f"conv must have no hooks, got {odd.split()[-1]}: register them on the new layer")
    if odd:
        raise ValueError(f"conv must be as PyTorch made it, but {odd}")


def pooling_of(pool: nn.Module | None) -> dict[str, Any]:
    """Our pooling arguments for a pooling layer of PyTorch."""
    if pool is None:
        return {"pool": None, "pool_size": 2, "pool_stride": None, "pool_padding": 0, "ceil_mode": False}
    if not isinstance(pool, nn.MaxPool2d | nn.AvgPool2d):
        raise TypeError(f"pool must be an nn.MaxPool2d, an nn.AvgPool2d or None, got {type(pool).__name__}")
    if isinstance(pool, nn.MaxPool2d):
        name = "max"
        if pool.return_indices:
            raise ValueError("pool: return_indices=True has no fused counterpart, only False is accepted")
        if pair("dilation", pool.dilation) != (1, 1):
            raise ValueError(f"pool: dilation must be 1, got {pool.dilation}")
    else:
        name = "avg"
        if pool.divisor_override is not None:
            raise ValueError(f"pool: divisor_override must be None, got {pool.divisor_override}")
        if not pool.count_include_pad and pair("padding", pool.padding) != (0, 0):
            raise ValueError("pool: count_include_pad=False is accepted only without padding")
    return {
        "pool": name,
        "pool_size": pool.kernel_size,
        "pool_stride": pool.stride,
        "pool_padding": pool.padding,
        "ceil_mode": pool.ceil_mode,
    }
