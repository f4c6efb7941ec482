"""The networks whose training steps are measured: the five, models of torchvision, and one of the CIFAR speed runs."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dlfast
from dlfast.models import NETWORKS, build

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """A model, the shape of its batch, and how it is trained."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    classes: int = 1000
    loss: Loss = F.cross_entropy
    optimizer: str = "SGD"
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.01, "momentum": 0.9})
    lower: bool = True  # trained in bfloat16 by autocast; else in float32 by TF32

    def fused(self, model: nn.Module, images: Tensor | None) -> nn.Module:
        """`model` with our layers and its weights; `images` for what only they can tell."""
        if isinstance(model, dlfast.models.ConvNet):
            ours = dlfast.models.ConvNet(model.network, self.classes, model.network.in_channels, model.input_size)
            ours.load_state_dict(model.state_dict())
            return ours.to(next(model.parameters()).device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dlfast.NotFusedWarning)
            return dlfast.fuse(model, images)


class SpeedRun(nn.Module):
    """A network of the CIFAR-10 speed runs: pooling comes before normalisation, and GELU after it.

    Source: https://github.com/KellerJordan/cifar10-airbench
    """

    WIDTHS = (24, 64, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, self.WIDTHS[0], 2)
        layers: list[nn.Module] = []
        for c, k in zip(self.WIDTHS, self.WIDTHS[1:], strict=False):
            layers += [nn.Conv2d(c, k, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(k), nn.GELU()]
            layers += [nn.Conv2d(k, k, 3, padding=1, bias=False), nn.BatchNorm2d(k), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.pool = nn.MaxPool2d(3)
        self.head = nn.Linear(self.WIDTHS[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.layers(F.gelu(self.whiten(images)))  # [N, 256, 3, 3]
        output: Tensor = self.head(self.pool(x).flatten(1))
        return output


BATCHES = {"vgg11_bn": 64, "resnet18": 128, "resnet50": 64, "googlenet": 64, "mobilenet_v3_large": 64}
SMALL_BATCHES = {"twoconv": 256, "convpool": 64, "mnistnet": 256, "stacked": 256, "lenet": 64}


def networks() -> dict[str, Network]:
    """All of them, those of the large first."""
    found = {
        name: Network(functools.partial(_of_torchvision, name), (batch, 3, 224, 224)) for name, batch in BATCHES.items()
    }
    found["speed run"] = Network(SpeedRun, (1024, 3, 32, 32), classes=10)
    for name, batch in SMALL_BATCHES.items():
        network = NETWORKS[name]
        adam = network.optimizer == "adam"
        options = {"lr": network.lr} if adam else {"lr": network.lr, "momentum": network.momentum}
        found[name] = Network(
            functools.partial(build, name, fused=False),
            (batch, network.in_channels, network.input_size, network.input_size), classes=10,
            loss=F.nll_loss if network.log_softmax else F.cross_entropy,
            optimizer="Adam" if adam else "SGD", options=options, lower=False,
        )  # fmt: skip
    return found


def _of_torchvision(name: str) -> nn.Module:
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


@dataclass(frozen=True)
class Mode:
    """One way to train: whose layers and optimizer, in which format, and launched by what."""

    ours: bool
    channels_last: bool = True
    launched: str = ""  # "", "graphed", "compile" or "compile reduce-overhead"

    def __str__(self) -> str:
        words = ["dlfast" if self.ours else "PyTorch", self.launched, "channels_last" if self.channels_last else ""]
        return " ".join(word for word in words if word)


class Training:
    """A copy of `model` in training as `mode` has it; call it for a step, which returns the loss."""

    def __init__(
        self, network: Network, model: nn.Module, images: Tensor, labels: Tensor, mode: Mode, **options: Any
    ) -> None:
        layout = torch.channels_last if mode.channels_last else torch.contiguous_format
        model = copy.deepcopy(model).to(memory_format=layout).train()
        self.images, self.labels = images.contiguous(memory_format=layout), labels
        self._device = images.device.type
        self._lower = network.lower
        graphed = mode.launched == "graphed"
        if mode.ours:
            with self._autocast():
                # A graph does not wait for the host, which only examples can tell to be too slow.
                model = network.fused(model, None if graphed else self.images)
        package: Any = dlfast.optim if mode.ours else torch.optim
        chosen = {**network.options, **options} if mode.ours else {**network.options, **options, "fused": True}
        if not mode.ours and graphed and network.optimizer != "SGD":
            chosen["capturable"] = True
        self._optimizer = getattr(package, network.optimizer)(model.parameters(), **chosen)
        self._loss = network.loss
        self._run: Callable[[Tensor], Tensor] = model
        self._marks = mode.launched == "compile reduce-overhead"
        self._step: Callable[[Tensor, Tensor], Tensor] = self._plain
        if graphed:
            with self._autocast():
                self._step = dlfast.graphed_step(model, self._loss, self._optimizer, (self.images, labels))
        elif mode.launched:
            self._run = torch.compile(model, mode="reduce-overhead" if self._marks else None)

    def __call__(self) -> Tensor:
        with self._autocast():
            return self._step(self.images, self.labels)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._lower)

    def _plain(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._marks:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad()
        loss = self._loss(self._run(images), labels)
        with torch.autocast(self._device, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        return loss.detach()
