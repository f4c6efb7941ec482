"""``dlfast train``: one network on one set of images, in a folder that can be resumed.

The folder of a run holds config.json, last.ckpt, best.ckpt, metrics.csv, curves.png and, once it is
finished, result.json. Each is there whole or not at all. The result is a function of the settings: the
weights of a run that was killed and resumed are, on a CPU, bit for bit those of one that was not.

Lightning and the sources of data are imported when training starts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dlfast._native import native, runs_on
from dlfast.app import data as datasets
from dlfast.app.errors import UsageError, one_line
from dlfast.app.files import write_whole
from dlfast.app.folder import told
from dlfast.app.settings import (
    BACKENDS,
    DEVICES,
    MAY_CHANGE,
    OPTIMIZERS,
    Settings,
    TrainConfig,
    new_settings,
    read_settings,
    resumed_settings,
)
from dlfast.models import NETWORKS, ConvNet, build

if TYPE_CHECKING:
    from dlfast.app.lightning import Epoch

__all__ = ["Result", "TrainConfig", "fit"]

RUN_FILES = ("config.json", "last.ckpt", "best.ckpt", "metrics.csv", "curves.png", "result.json")


@dataclass(frozen=True)
class Result:
    """What :func:`fit` found. The checkpoints are None where no folder was kept.

    `images_per_second` is the median over the epochs, without the first where there are more.
    `step_losses` are of the steps of this call, so a resumed run has only its own.
    """

    test_accuracy: float
    test_loss: float
    test_name: str
    best_epoch: int
    history: list[Epoch]
    images_per_second: float
    best_checkpoint: Path | None
    last_checkpoint: Path | None
    step_losses: list[float]


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM); its exit status is what a shell would report."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def fit(config: TrainConfig) -> Result:
    """Train as `config` says, and test the weights of the best epoch.

    Raises:
        UsageError: the options, the data or the files of the run do not allow it.
        OSError: a file cannot be read or written.
        KeyboardInterrupt, Terminated: the run was stopped; `config.resume` goes on from its last epoch.

    >>> result = fit(TrainConfig("mnistnet", input_size=(8, 8), epochs=1, progress=False))
    >>> result.test_accuracy > 0.5, len(result.history)
    (True, 1)
    """
    if config.out is None:
        if config.resume:
            raise UsageError("--resume needs --out, the folder of the run")
        with tempfile.TemporaryDirectory(prefix="dlfast-") as folder:
            result = fit(dataclasses.replace(config, out=Path(folder)))
        return dataclasses.replace(result, best_checkpoint=None, last_checkpoint=None)
    settings = _settings(config, config.out)
    _check_model(settings)
    device = _device(settings.device)
    with _only_process(config.out):
        return _fit(settings, config, config.out, device)


def _settings(config: TrainConfig, out: Path) -> Settings:
    file = out / "config.json"
    if config.resume:
        if not file.is_file():
            raise UsageError(f"--resume: there is no run in {out}")
        return resumed_settings(config, read_settings(file))
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is not a folder")
    if any((out / name).exists() for name in RUN_FILES):
        raise UsageError(f"--out: {out} already holds a run; go on with --resume, or name another folder")
    return new_settings(config)


def _check_model(settings: Settings) -> None:
    """Refuse a wrong size before images are loaded or a folder is made."""
    with torch.device("meta"):
        _model(settings, num_classes=10)


def _model(settings: Settings, num_classes: int) -> ConvNet:
    try:
        return build(settings.network, num_classes, input_size=settings.input_size, fused=settings.backend == "fused")
    except ValueError as error:
        raise UsageError(f"{settings.network}: {one_line(error)}") from error


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available")
    return name


def _can_be_graphed(settings: Settings, device: str) -> bool:
    """Whether a CUDA graph holds the steps of this run: dlfast's optimizers need a build for the GPU."""
    return device == "cuda" and (settings.backend == "torch" or runs_on(torch.device("cuda")))


@contextlib.contextmanager
def _only_process(out: Path) -> Iterator[None]:
    """Two runs must not write into one folder. The lock ends with the process, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out: another process is training in {out}") from None
        yield
    finally:
        os.close(descriptor)


def _fit(settings: Settings, config: TrainConfig, out: Path, device: str) -> Result:
    import pytorch_lightning as pl

    from dlfast.app import lightning

    channels = NETWORKS[settings.network].in_channels
    folder = None if settings.data_dir is None else Path(settings.data_dir)
    data = datasets.load(settings.data, channels, settings.input_size, folder, settings.seed)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    model = _model(settings, len(data.classes))
    graphed = config.cuda_graph and _can_be_graphed(settings, device)
    training = lightning.Training(model, settings, len(data.classes), data.fingerprint, graphed)
    say = print if config.progress else _say_nothing
    record = lightning.Record(out, lightning.print_epoch(settings.epochs) if config.progress else _say_nothing)
    last = out / "last.ckpt"
    saved = _checked(lightning.read_checkpoint(last), training, last) if last.exists() else None
    if saved is not None:
        record.load_state_dict(saved["callbacks"][record.state_key])
        lightning.write_history(out, record.history)
    write_whole(out / "config.json", settings.to_json())
    _describe(say, settings, data, device)

    def loader(part: torch.utils.data.Dataset[datasets.Batch], shuffle: bool = False) -> Any:
        return datasets.batches(
            part,
            settings.batch_size,
            shuffle_seed=settings.seed if shuffle else None,
            workers=settings.workers,
            pin=device == "cuda",
        )

    with lightning.quiet(), _interruptible(record):
        bar = config.progress and sys.stdout.isatty()
        trainer = lightning.trainer(out, settings.epochs, device, record, bar)
        if len(record.history) < settings.epochs:
            # What a shorter run ended with is no result of this one, should it be killed.
            (out / "result.json").unlink(missing_ok=True)
            if saved is not None:
                say(f"resuming after epoch {len(record.history)}")
            trainer.fit(
                training,
                loader(data.train, shuffle=True),
                loader(data.val),
                ckpt_path=last if saved else None,
            )
        else:
            say(f"the run in {out} is finished: it has its {settings.epochs} epochs")
        best = out / "best.ckpt"
        training.load_state_dict(_checked(lightning.read_checkpoint(best), training, best)["state_dict"])
        trainer.test(training, loader(data.test), verbose=False)
    test_loss, test_accuracy = training.take("test")
    speeds = [row.images_per_second for row in record.history]
    result = Result(
        test_accuracy=test_accuracy,
        test_loss=test_loss,
        test_name=data.test_name,
        best_epoch=lightning.best_epoch(record.history).epoch,
        history=record.history,
        images_per_second=statistics.median(speeds[1:] or speeds),
        best_checkpoint=best,
        last_checkpoint=last,
        step_losses=[float(loss) for loss in training.step_losses],
    )
    names = ("test_accuracy", "test_loss", "test_name", "best_epoch", "images_per_second")
    summary = {name: getattr(result, name) for name in names}
    write_whole(out / "result.json", (json.dumps(summary, indent=2) + "\n").encode())
    return result


def _say_nothing(_: object) -> None:
    pass


def _checked(checkpoint: dict[str, Any], training: Any, path: Path) -> dict[str, Any]:
    """`checkpoint`, if it belongs to this run."""
    ours = checkpoint["dlfast"]
    recorded = {"revision": Settings.revision} | ours["settings"]
    for name, value in dataclasses.asdict(training.settings).items():
        if name not in MAY_CHANGE and recorded.get(name) != value:
            raise UsageError(f"{path}: is of another run ({name} {recorded.get(name)}, not {value})")
    if ours["fingerprint"] != training.fingerprint:
        raise UsageError(f"{path}: was made from other images than those in --data {training.settings.data} now")
    return checkpoint


def _describe(say: Callable[[str], object], s: Settings, data: datasets.Data, device: str) -> None:
    counts = [f"{len(part)} {name}" for name, part in (("train", data.train), ("val", data.val))]  # type: ignore[arg-type]
    if data.test_name == "test":
        counts.append(f"{len(data.test)} test")  # type: ignore[arg-type]
    backend = s.backend if s.backend == "torch" or native.module else "fused (pure PyTorch fallback)"
    momentum = f" momentum {s.momentum:g}" if s.momentum else ""
    say(
        f"{s.network} on {s.data}: {', '.join(counts)} images of {s.input_size[0]}x{s.input_size[1]}, "
        f"{len(data.classes)} classes; {s.optimizer} lr {s.lr:g}{momentum}, batch size {s.batch_size}, "
        f"backend {backend}, {device}, seed {s.seed}"
    )
    if data.left_out:
        say(f"left out: {told(data.left_out)}")


@contextlib.contextmanager
def _interruptible(record: Any) -> Iterator[None]:
    """Lightning turns both Ctrl-C and SIGTERM into a SystemExit, and leaves Ctrl-C switched off."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if isinstance(record.exception, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise Terminated from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _image_size(text: str) -> tuple[int, int]:
    """
    >>> _image_size("28"), _image_size("17x33")
    ((28, 28), (17, 33))
    """
    parts = [int(part) for part in text.split("x")]
    if len(parts) not in (1, 2) or min(parts) < 1:
        raise ValueError(text)
    return (parts[0], parts[-1])


_image_size.__name__ = "size"  # what argparse calls it: "invalid size value: '0'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dlfast train``. None of them has a default here, see `dlfast.app.settings`."""
    add = parser.add_argument
    add("network", choices=tuple(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    add("--data", choices=tuple(datasets.SOURCES), help="the images (default: digits, which needs no network)")
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder of the images (default: data, where mnist and cifar10 are downloaded to)",
    )
    add("--input-size", type=_image_size, metavar="N|HxW", help="resize images (default: the article's)")
    add("--epochs", type=int, metavar="N", help="passes over the training images (default: 5)")
    add("--batch-size", type=int, metavar="N", help="images per step (default: the article's)")
    add("--optimizer", choices=OPTIMIZERS, help="(default: the article's)")
    add("--lr", type=float, metavar="X", help="learning rate (default: the article's)")
    add("--momentum", type=float, metavar="X", help="of sgd (default: the article's)")
    add("--weight-decay", type=float, metavar="X", help="(default: as in torch.optim)")
    add("--device", choices=DEVICES, help="(default: auto, the GPU where there is one)")
    add("--backend", choices=BACKENDS, help="dlfast's or PyTorch's layers and optimizer (default: fused)")
    add("--seed", type=int, metavar="N", help="of weights, order of images and splits (default: 0)")
    add("--workers", type=int, metavar="N", help="processes that load images (default: 0, none)")
    add(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        help="on a GPU, launch the operators of each step one by one, not as a CUDA graph",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/NETWORK-DATA-BACKEND)")
    add("--resume", action="store_true", help="go on with the run in --out; its options need no repeating")


def run(args: argparse.Namespace) -> int:
    """``dlfast train`` with parsed options; the exit status."""
    if args.out is None:
        args.out = Path("runs") / f"{args.network}-{args.data or 'digits'}-{args.backend or 'fused'}"
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in vars(args).items() if name in names})
    try:
        result = fit(config)
    except (KeyboardInterrupt, Terminated) as stop:
        command = f"dlfast train {args.network} --out {shlex.quote(str(args.out))} --resume"
        saved = (args.out / "config.json").is_file()
        print(f"\ninterrupted; {'go on with: ' + command if saved else 'nothing was saved'}", file=sys.stderr)
        return stop.code if isinstance(stop, Terminated) else 128 + signal.SIGINT  # type: ignore[return-value]
    note = "" if result.test_name == "test" else f" (on {result.test_name}, there is no test folder)"
    print(f"test accuracy {result.test_accuracy:.4f}, loss {result.test_loss:.4f}{note}")
    print(f"weights of epoch {result.best_epoch}, the best on val; files in {args.out}")
    return 0
