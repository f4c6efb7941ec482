"""What follows a convolution or a normalisation: the activation and the pooling window, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dlfast.functional.arguments import Size2, pair


@dataclass(frozen=True)
class Window:
    """Activation and pooling, with the names and defaults of :class:`dlfast.nn.ConvReLUPool2d`.

    >>> Window.checked("max", 3, 2, 1, False, "relu")
    Window(activation='relu', pool='max', pool_size=(3, 3), pool_stride=(2, 2), pool_padding=(1, 1), ceil_mode=False)
    >>> print(Window.checked("max", 2, None, 0, False, "relu"))
    activation='relu', pool='max', pool_size=(2, 2)
    """

    NAMES: ClassVar = ("activation", "pool", "pool_size", "pool_stride", "pool_padding", "ceil_mode")

    activation: str | None = "relu"
    pool: str | None = "max"
    pool_size: tuple[int, int] = (2, 2)
    pool_stride: tuple[int, int] = (2, 2)
    pool_padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False

    @classmethod
    def checked(
        cls,
        pool: str | None,
        pool_size: Size2,
        pool_stride: Size2 | None,
        pool_padding: Size2,
        ceil_mode: bool,
        activation: str | None,
    ) -> Window:
        """The window of these arguments.

        Raises:
            ValueError: one of them is outside what is accepted.
        """
        if activation not in ("relu", None):
            raise ValueError(f"activation must be 'relu' or None, got {activation!r}")
        if pool not in ("max", "avg", None):
            raise ValueError(f"pool must be 'max', 'avg' or None, got {pool!r}")
        size = pair("pool_size", pool_size)
        stride = size if pool_stride is None else pair("pool_stride", pool_stride)
        padding = pair("pool_padding", pool_padding)
        if min(size) < 1 or min(stride) < 1:
            raise ValueError(f"pool_size and pool_stride must be at least 1, got {size} and {stride}")
        if any(p < 0 or 2 * p > k for p, k in zip(padding, size, strict=True)):
            raise ValueError(
                f"pool_padding must be between 0 and half of pool_size, got {padding} for pool_size {size}"
            )
        return cls(activation, pool, size, stride, padding, ceil_mode)

    def options(self) -> dict[str, Any]:
        """As keyword arguments of :func:`dlfast.conv_relu_pool2d`."""
        return {name: getattr(self, name) for name in self.NAMES}

    def __str__(self) -> str:
        text = f"activation={self.activation!r}, pool={self.pool!r}"
        if self.pool is None:
            return text
        text += f", pool_size={self.pool_size}"
        if self.pool_stride != self.pool_size:
            text += f", pool_stride={self.pool_stride}"
        if self.pool_padding != (0, 0):
            text += f", pool_padding={self.pool_padding}"
        if self.ceil_mode:
            text += ", ceil_mode=True"
        return text
