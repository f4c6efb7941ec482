"""The five networks, each once with fused layers and once in plain PyTorch.

A network is a row of the table `NETWORKS`: its stages (convolution, ReLU, pooling), its fully connected
layers, and what its article trained it on and with. `fused=True` and `fused=False` differ only in which
operators run: state_dict keys, order of parameters and values under the same seed are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dlfast.functional.arguments import Size2, pair
from dlfast.nn import ConvPool2d, ConvReLU2d, ConvReLUPool2d

__all__ = [
    "NETWORKS",
    "ConvNet",
    "Network",
    "Stage",
    "build",
    "convpool",
    "lenet",
    "mnistnet",
    "stacked",
    "twoconv",
]


@dataclass(frozen=True)
class Stage:
    """A convolution of stride 1, and what follows it."""

    channels: int
    kernel_size: int
    padding: int = 0
    relu: bool = True
    pool: bool = True  # maximum over windows of 2x2

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after this stage; zero or negative where `size` is too small."""
        height, width = (s + 2 * self.padding - self.kernel_size + 1 for s in size)
        return (height // 2, width // 2) if self.pool else (height, width)


@dataclass(frozen=True)
class Network:
    """The layers of a network, and the settings of its article."""

    stages: tuple[Stage, ...]
    hidden: tuple[int, ...]  # widths of the fully connected layers before the last, each with ReLU
    log_softmax: bool  # ends in log-probabilities, so its loss is NLL instead of cross entropy
    in_channels: int
    input_size: int
    data: str
    optimizer: str
    lr: float
    batch_size: int
    momentum: float = 0.0


NETWORKS: dict[str, Network] = {
    "twoconv": Network(
        stages=(Stage(64, 3, padding=1, pool=False), Stage(64, 3, padding=1, pool=False)),
        hidden=(256,), log_softmax=False, in_channels=3, input_size=32,
        data="cifar10", optimizer="sgd", lr=0.01, batch_size=64,
    ),
    "convpool": Network(
        stages=(Stage(32, 3, padding=1, relu=False), Stage(64, 3, padding=1, relu=False)),
        hidden=(), log_softmax=False, in_channels=1, input_size=289,
        data="folder", optimizer="sgd", lr=0.01, batch_size=64,
    ),
    "mnistnet": Network(
        stages=(Stage(32, 3, padding=1), Stage(64, 3, padding=1)),
        hidden=(128,), log_softmax=False, in_channels=1, input_size=28,
        data="mnist", optimizer="adam", lr=1e-3, batch_size=64,
    ),
    "stacked": Network(
        stages=(Stage(32, 3, pool=False), Stage(64, 3)),
        hidden=(128,), log_softmax=True, in_channels=1, input_size=28,
        data="mnist", optimizer="adam", lr=1e-3, batch_size=64,
    ),
    "lenet": Network(
        stages=(Stage(6, 5), Stage(16, 5)),
        hidden=(120, 84), log_softmax=False, in_channels=3, input_size=32,
        data="cifar10", optimizer="sgd", lr=0.001, batch_size=4, momentum=0.9,
    ),
}  # fmt: skip


class ConvNet(nn.Module):
    """A network of the table: layers ``conv1``, ``conv2``, ... then ``fc1``, ``fc2``, ...

    Args:
        network: a row of `NETWORKS`, or one's own.
        num_classes: width of the last layer.
        in_channels: channels of the images.
        input_size: their height and width, as one int or a pair. The fully connected layers follow from it.
        fused: layers of `dlfast.nn`; else ``nn.Conv2d`` with ReLU and pooling as functions.

    Shape:
        - input: (N, in_channels, height, width)
        - output: (N, num_classes); log-probabilities where the network ends in log_softmax

    Raises:
        ValueError: an argument is not positive, or `input_size` is too small for the layers.
    """

    def __init__(
        self, network: Network, num_classes: int, in_channels: int, input_size: Size2, fused: bool = True
    ) -> None:
        super().__init__()
        _check_positive("num_classes", num_classes)
        _check_positive("in_channels", in_channels)
        self.network = network
        self.fused = fused
        size = self.input_size = pair("input_size", input_size)
        _check_positive("input_size", *size)

        self.convs: list[str] = []
        channels = in_channels
        for number, stage in enumerate(network.stages, 1):
            size = stage.output_size(size)
            if min(size) < 1:
                raise ValueError(f"input_size {self.input_size} is too small: nothing is left after conv{number}")
            self.convs.append(f"conv{number}")
            self.add_module(self.convs[-1], _fused(stage, channels) if fused else _plain(stage, channels))
            channels = stage.channels

        self.fcs: list[str] = []
        features = channels * size[0] * size[1]
        for number, width in enumerate((*network.hidden, num_classes), 1):
            self.fcs.append(f"fc{number}")
            self.add_module(self.fcs[-1], nn.Linear(features, width))
            features = width

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[2:]) != self.input_size:
            raise ValueError(
                f"input must be (N, C, {self.input_size[0]}, {self.input_size[1]}) as input_size says, "
                f"got {tuple(x.shape)}"
            )
        for name, stage in zip(self.convs, self.network.stages, strict=True):
            x = self.get_submodule(name)(x)  # [N, stage.channels, H, W]
            if not self.fused and stage.relu:
                x = F.relu(x)
            if not self.fused and stage.pool:
                x = F.max_pool2d(x, 2)
        x = x.flatten(1)  # [N, channels * H * W]
        for name in self.fcs:
            x = self.get_submodule(name)(x)  # [N, width]
            if name != self.fcs[-1]:
                x = F.relu(x)
        return F.log_softmax(x, dim=1) if self.network.log_softmax else x

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss that fits the network's output: `output` (N, num_classes), `target` (N,) of int64."""
        return F.nll_loss(output, target) if self.network.log_softmax else F.cross_entropy(output, target)


def _fused(stage: Stage, in_channels: int) -> nn.Module:
    arguments = (in_channels, stage.channels, stage.kernel_size)
    if not stage.pool:
        return ConvReLU2d(*arguments, padding=stage.padding)
    if not stage.relu:
        return ConvPool2d(*arguments, padding=stage.padding, pool_size=2)
    return ConvReLUPool2d(*arguments, padding=stage.padding, pool_size=2)


def _plain(stage: Stage, in_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, stage.channels, stage.kernel_size, padding=stage.padding)


def _check_positive(name: str, *values: int) -> None:
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
        shown: int | Sequence[int] = values[0] if len(values) == 1 else values
        raise ValueError(f"{name} must be at least 1, got {shown!r}")


def build(
    name: str,
    num_classes: int = 10,
    in_channels: int | None = None,
    input_size: Size2 | None = None,
    fused: bool = True,
) -> ConvNet:
    """The network called `name`; None means the size or channels of its article.

    Raises:
        ValueError: there is no such network, or as :class:`ConvNet`.

    >>> build("lenet", fused=False).fc1
    Linear(in_features=400, out_features=120, bias=True)
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    return ConvNet(
        network,
        num_classes,
        network.in_channels if in_channels is None else in_channels,
        network.input_size if input_size is None else input_size,
        fused,
    )


def twoconv(num_classes: int = 10, in_channels: int = 3, input_size: Size2 = 32, fused: bool = True) -> ConvNet:
    """Two 3x3 convolutions of 64 channels with ReLU, no pooling, then 256 features with ReLU and `num_classes`.

    >>> import torch
    >>> twoconv(input_size=8)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """
    return build("twoconv", num_classes, in_channels, input_size, fused)


def convpool(num_classes: int = 10, in_channels: int = 1, input_size: Size2 = 289, fused: bool = True) -> ConvNet:
    """Two 3x3 convolutions, each with max pooling and no activation, then one linear layer.

    >>> import torch
    >>> convpool(input_size=(17, 33))(torch.randn(2, 1, 17, 33)).shape
    torch.Size([2, 10])
    """
    return build("convpool", num_classes, in_channels, input_size, fused)


def mnistnet(num_classes: int = 10, in_channels: int = 1, input_size: Size2 = 28, fused: bool = True) -> ConvNet:
    """Two 3x3 convolutions, each with ReLU and max pooling, then 128 features with ReLU and `num_classes`.

    >>> import torch
    >>> mnistnet()(torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    return build("mnistnet", num_classes, in_channels, input_size, fused)


def stacked(num_classes: int = 10, in_channels: int = 1, input_size: Size2 = 28, fused: bool = True) -> ConvNet:
    """Two unpadded 3x3 convolutions with ReLU, one max pooling, then 128 features with ReLU and log-probabilities.

    >>> import torch
    >>> stacked()(torch.randn(1, 1, 28, 28)).exp().sum().allclose(torch.tensor(1.0))
    True
    """
    return build("stacked", num_classes, in_channels, input_size, fused)


def lenet(num_classes: int = 10, in_channels: int = 3, input_size: Size2 = 32, fused: bool = True) -> ConvNet:
    """Two 5x5 convolutions of 6 and 16 channels with ReLU and max pooling, then 120, 84 (ReLU), `num_classes`.

    >>> lenet(input_size=11)
    Traceback (most recent call last):
        ...
    ValueError: input_size (11, 11) is too small: nothing is left after conv2
    """
    return build("lenet", num_classes, in_channels, input_size, fused)
