"""What a training run was asked to do: the options, their defaults, and what may change on resuming.

An option that was not given is None here. A new run fills it from the network's article; a resumed run
takes it from the run itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

import dlfast.optim
from dlfast.app.data import SOURCES
from dlfast.app.errors import UsageError, one_line
from dlfast.models import NETWORKS

OPTIMIZERS = ("sgd", "adam", "adamw")
DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("fused", "torch")
DEFAULT_LR = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}
# With the same values of all others a run gives the same result; these only say how far, where and how.
MAY_CHANGE = ("epochs", "workers", "device", "data_dir")
REVISION = 2
# What a setting stood for before a revision; a run from then would go on as something else.
EARLIER = (
    (2, "network", "twoconv", "had no ReLU between its linear layers"),
    (2, "data", "folder", "ignored the EXIF orientation and transparency of images"),
)


@dataclass(frozen=True)
class TrainConfig:
    """The options of ``dlfast train``; None means: not given.

    Args:
        network: a name in `dlfast.models.NETWORKS`.
        data: "digits", "mnist", "cifar10" or "folder".
        data_dir: folder of the files of `data`.
        input_size: height and width to which images are resized.
        epochs, batch_size, lr, momentum, weight_decay, seed, workers: numbers; momentum is SGD's.
        optimizer: "sgd", "adam" or "adamw".
        device: "auto", "cpu" or "cuda".
        backend: "fused" (dlfast's layers and optimizers) or "torch" (PyTorch's).
        out: folder of the run's files; None keeps none.
        resume: go on with the run in `out`.
        progress: print a line per epoch, and a bar on a terminal.
        cuda_graph: on a GPU, take whole steps as CUDA graphs, to the same result.
    """

    network: str
    data: str | None = None
    data_dir: Path | None = None
    input_size: tuple[int, int] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    device: str | None = None
    backend: str | None = None
    seed: int | None = None
    workers: int | None = None
    out: Path | None = None
    resume: bool = False
    progress: bool = True
    cuda_graph: bool = True


@dataclass(frozen=True)
class Settings:
    """A :class:`TrainConfig` with every option decided."""

    network: str
    data: str
    data_dir: str | None
    input_size: tuple[int, int]
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    device: str
    backend: str
    seed: int
    workers: int
    revision: int = 1  # of what the other settings mean; runs from before it was recorded are of the first

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()


def new_settings(config: TrainConfig) -> Settings:
    """`config` with the defaults of its network.

    Raises:
        UsageError: a value is unknown or out of range; the message names the option.

    >>> new_settings(TrainConfig("lenet")).batch_size
    4
    >>> new_settings(TrainConfig("lenet", lr=-1.0))
    Traceback (most recent call last):
        ...
    dlfast.app.errors.UsageError: --lr must be a positive number, got -1.0
    """
    if config.network not in NETWORKS:
        raise UsageError(f"unknown network {config.network!r}; there are {', '.join(NETWORKS)}")
    network = NETWORKS[config.network]
    optimizer = network.optimizer if config.optimizer is None else config.optimizer
    articles = optimizer == network.optimizer
    if config.momentum is not None and optimizer != "sgd":
        raise UsageError(f"--momentum belongs to sgd, not to {optimizer}")
    defaults: dict[str, Any] = {
        "data": "digits",
        "input_size": (network.input_size, network.input_size),
        "epochs": 5,
        "batch_size": network.batch_size,
        "optimizer": optimizer,
        "lr": network.lr if articles else DEFAULT_LR.get(optimizer),
        "momentum": network.momentum if articles else 0.0,
        "weight_decay": 0.01 if optimizer == "adamw" else 0.0,  # as in torch.optim
        "device": "auto",
        "backend": "fused",
        "seed": 0,
        "workers": 0,
        "revision": REVISION,
    }
    settings = Settings(**{"network": config.network, "data_dir": None, **defaults, **_given(config)})
    _check(settings)
    return settings


def resumed_settings(config: TrainConfig, saved: Settings) -> Settings:
    """`saved`, with those options of `config` that may change.

    Raises:
        UsageError: an option that decides the result was given with another value, or means something else now.
    """
    for revision, name, value, difference in EARLIER:
        if saved.revision < revision and getattr(saved, name) == value:
            raise UsageError(
                f"--resume: the run in {config.out} is of an earlier version, in which {value} {difference}; "
                f"start a new run with another --out"
            )
    given = _given(config)
    for name, value in given.items():
        before = getattr(saved, name)
        if name not in MAY_CHANGE and value != before:
            option = "the network" if name == "network" else "--" + name.replace("_", "-")
            raise UsageError(
                f"--resume: {option} is {_shown(before)} in {config.out}, not {_shown(value)}; "
                f"leave it out, or start a new run with another --out"
            )
    settings = dataclasses.replace(saved, **given)
    _check(settings)
    if settings.epochs < saved.epochs:
        raise UsageError(
            f"--resume: --epochs is {saved.epochs} in {config.out} and can only grow, got {settings.epochs}"
        )
    return settings


def _given(config: TrainConfig) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(Settings) if f.name != "revision"}
    if config.data_dir is not None:
        # Absolute, so that a run can be resumed from another folder.
        values["data_dir"] = str(config.data_dir.absolute())
    return {name: value for name, value in values.items() if value is not None}


def _shown(value: object) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value)


def read_settings(path: Path) -> Settings:
    """What :meth:`Settings.to_json` wrote.

    Raises:
        UsageError: the file is not that.
    """
    try:
        values = json.loads(path.read_bytes())
        settings = Settings(**{**values, "input_size": tuple(values["input_size"])})
        _check(settings)
    except (ValueError, TypeError, KeyError, UsageError) as error:
        raise UsageError(f"{path}: not the settings of a run ({one_line(error)})") from error
    return settings


def make_optimizer(
    settings: Settings, parameters: Iterable[Parameter], fused: bool | None = None, capturable: bool = False
) -> torch.optim.Optimizer:
    """dlfast's optimizer, or PyTorch's where the backend is "torch"; `fused` and `capturable` as torch.optim takes
    them, and whatever a checkpoint says that is loaded later."""
    package: Any = dlfast.optim if settings.backend == "fused" else torch.optim
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": fused}
    if settings.optimizer == "sgd":
        options["momentum"] = settings.momentum
    elif settings.backend == "torch":
        options["capturable"] = capturable
    kinds = {"sgd": package.SGD, "adam": package.Adam, "adamw": package.AdamW}
    optimizer = kinds[settings.optimizer](parameters, **options)
    assert isinstance(optimizer, torch.optim.Optimizer)
    if settings.backend == "torch":  # dlfast's keeps its own by itself
        optimizer.register_load_state_dict_pre_hook(_with_own_capturable)
    return optimizer


def _with_own_capturable(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A run may go on with or without a GPU, where steps are counted on different devices."""
    pairs = zip(saved["param_groups"], optimizer.param_groups, strict=False)  # torch.optim refuses other numbers
    groups = [
        {**group, "capturable": own["capturable"]} if "capturable" in group and "capturable" in own else group
        for group, own in pairs
    ]
    return {**saved, "param_groups": groups} if len(groups) == len(saved["param_groups"]) else saved


def _check(settings: Settings) -> None:
    choices: dict[str, tuple[str, ...]] = {
        "network": tuple(NETWORKS),
        "data": tuple(SOURCES),
        "optimizer": OPTIMIZERS,
        "device": DEVICES,
        "backend": BACKENDS,
    }
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise UsageError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(settings, name)!r}")
    for name, least in {"epochs": 1, "batch_size": 1, "seed": 0, "workers": 0}.items():
        if getattr(settings, name) < least:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} must be at least {least}, got {getattr(settings, name)}")
    if not 1 <= settings.revision <= REVISION:
        raise UsageError(f"revision must be 1 to {REVISION} in this version, got {settings.revision}")
    if settings.seed >= 2**32:
        raise UsageError(f"--seed must be below 2**32, got {settings.seed}")
    if not (settings.lr > 0 and math.isfinite(settings.lr)):
        raise UsageError(f"--lr must be a positive number, got {settings.lr}")
    if not 0 <= settings.momentum < 1:
        raise UsageError(f"--momentum must be at least 0 and below 1, got {settings.momentum}")
    if not (settings.weight_decay >= 0 and math.isfinite(settings.weight_decay)):
        raise UsageError(f"--weight-decay must be at least 0, got {settings.weight_decay}")
