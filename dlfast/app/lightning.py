"""What PyTorch Lightning needs to know of our training: the step, the record of epochs, whole files.

Imports Lightning and torchmetrics, so nothing imports this module before training starts.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint, TQDMProgressBar
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from dlfast.app.data import Batch, Unreadable
from dlfast.app.errors import UsageError, one_line
from dlfast.app.files import write_whole
from dlfast.app.settings import Settings, make_optimizer
from dlfast.graphed import GraphedStep, NotGraphedWarning, graphed_step
from dlfast.models import ConvNet

FORMAT = 1  # of what a checkpoint holds under "dlfast"


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.csv. Speed is that of the training part, loading of data included."""

    epoch: int  # from 1
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float
    seconds: float


class Training(pl.LightningModule):
    """Trains `model` by `settings`; `fingerprint` says on which data, `graphed` whether each step is one CUDA graph."""

    def __init__(
        self, model: ConvNet, settings: Settings, num_classes: int, fingerprint: str, graphed: bool = False
    ) -> None:
        super().__init__()
        self.automatic_optimization = not graphed  # Lightning's own steps cannot be captured
        self._graphed_step: GraphedStep | None = None
        self.model = model
        self.settings = settings
        self.fingerprint = fingerprint
        self.step_losses: list[Tensor] = []
        # Sum over images, and their number.
        self.loss_sums: dict[str, tuple[Tensor | float, int]] = {}
        for name in ("train", "val", "test"):
            self.loss_sums[name] = (0.0, 0)
        # Its checks of every batch would cost as much as a small network's step.
        for name in self.loss_sums:
            metric = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            self.add_module(f"{name}_accuracy", metric)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Whether graphs are used or not: PyTorch rounds otherwise where it counts steps on the GPU.
        return make_optimizer(self.settings, self.model.parameters(), capturable=self.on_gpu)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, Unreadable):
            raise UsageError(batch.message)
        return batch

    def _step(self, part: str, batch: Batch) -> Tensor:
        images, labels = batch  # [B, C, H, W], [B]
        output = self.model(images)  # [B, num_classes]
        loss = self.model.loss(output, labels)
        self._count(part, output, loss, labels)
        return loss

    def _count(self, part: str, output: Tensor, loss: Tensor, labels: Tensor) -> None:
        getattr(self, f"{part}_accuracy").update(output, labels)
        total, count = self.loss_sums[part]
        # Stays on the device, so that nothing waits for it.
        self.loss_sums[part] = (total + loss.detach().double() * len(labels), count + len(labels))

    def _whole_step(self, batch: Batch) -> Tensor:
        """Forward, backward and the optimizer's step, of which Lightning is told as its own wrapper would tell it."""
        images, labels = batch
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if self._graphed_step is None:
            try:
                self._graphed_step = graphed_step(self.model, self.model.loss, optimizer.optimizer, (images, labels))
            except RuntimeError as error:
                raise RuntimeError(f"{error} (with --no-cuda-graph this run does without)") from error
        optimizer._on_before_step()
        loss = self._graphed_step(images, labels)
        optimizer._on_after_step()
        self._count("train", self._graphed_step.output, loss, labels)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._step("train", batch) if self.automatic_optimization else self._whole_step(batch)
        self.step_losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step("test", batch)

    def take(self, part: str) -> tuple[float, float]:
        """Mean loss and accuracy over `part` since the last call."""
        total, count = self.loss_sums[part]
        result = (float(total) / count, self.accuracy(part))
        self.loss_sums[part] = (0.0, 0)
        getattr(self, f"{part}_accuracy").reset()
        return result

    def accuracy(self, part: str) -> float:
        """Over `part` so far."""
        return float(getattr(self, f"{part}_accuracy").compute())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dlfast"] = {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "fingerprint": self.fingerprint,
        }


class Record(Checkpoint):
    """Writes down every epoch: best.ckpt, last.ckpt, metrics.csv and curves.png in `out`.

    The history is part of the checkpoint, and the other files are made from it anew each time. So whatever
    happens between two writes, resuming from last.ckpt brings all of them back into step.
    """

    def __init__(self, out: Path, report: Callable[[Epoch], None]) -> None:
        super().__init__()
        self.out = out
        self.report = report
        self.history: list[Epoch] = []
        self.exception: BaseException | None = None
        self.started = self.ended = 0.0
        self.images = 0

    def state_dict(self) -> dict[str, Any]:
        return {"history": [asdict(epoch) for epoch in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [Epoch(**epoch) for epoch in state_dict["history"]]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = self.ended = time.perf_counter()
        self.images = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch[1])
        if batch_idx + 1 == trainer.num_training_batches and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.ended = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        """Of the current epoch so far."""
        seconds = self.ended - self.started
        return self.images / seconds if seconds > 0 else 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        row = Epoch(
            len(self.history) + 1,
            *pl_module.take("train"),
            *pl_module.take("val"),
            images_per_second=self.images_per_second,
            seconds=self.ended - self.started,
        )
        self.history.append(row)
        # best before last: a kill in between repeats this epoch and writes the same best.ckpt again.
        if best_epoch(self.history) is row:
            trainer.save_checkpoint(self.out / "best.ckpt")
        trainer.save_checkpoint(self.out / "last.ckpt")
        write_history(self.out, self.history)
        self.report(row)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.exception = exception


def best_epoch(history: list[Epoch]) -> Epoch:
    """The epoch of the highest accuracy on val; among equals the lowest loss, then the first."""
    return max(history, key=lambda e: (e.val_accuracy, -e.val_loss if math.isfinite(e.val_loss) else -math.inf))


def write_history(out: Path, history: list[Epoch]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    write_whole(out / "metrics.csv", table.getvalue().encode())
    write_whole(out / "curves.png", _curves(history))


def _curves(history: list[Epoch]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row.epoch for row in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "val"):
            values = [getattr(row, f"{part}_{name}") for row in history]
            axes.plot(epochs, values, label=part, marker="o", markersize=3)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, and whose defects are told in one line."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        # Into memory first: torch reports a full disk without saying so.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getvalue())

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU. Nothing in the file is executed.

    Raises:
        UsageError: it is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint")
    try:
        # torch.load does not look at the checksums that torch.save wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # torch.load answers a damaged file with whatever its zip reader or unpickler trips over.
    except Exception as error:
        raise UsageError(f"{path}: corrupt checkpoint ({one_line(error)[:100]})") from error
    ours = checkpoint.get("dlfast") if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        raise UsageError(f"{path}: not a checkpoint of this version of dlfast train")
    return dict(checkpoint)


class Bar(TQDMProgressBar):
    """Lightning's bar with loss, accuracy and images per second."""

    def __init__(self, record: Record) -> None:
        super().__init__(refresh_rate=10)
        self.record = record

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}")  # Lightning's is from 0

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, Training)
        total, count = pl_module.loss_sums["train"]
        if count == 0:
            return {}
        return {
            "loss": f"{float(total) / count:.4f}",
            "accuracy": f"{pl_module.accuracy('train'):.4f}",
            "images/s": f"{self.record.images_per_second:.0f}",
        }


def trainer(out: Path, epochs: int, device: str, record: Record, bar: bool) -> pl.Trainer:
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[record, *([Bar(record)] if bar else [])],
        enable_progress_bar=bar,
        enable_model_summary=False,
        logger=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        # Only a GPU has operators whose result depends on the order of threads; some have no other form.
        deterministic="warn" if device == "cuda" else None,
        # Under a cluster's scheduler Lightning would otherwise write checkpoints of its own.
        plugins=[WholeFiles(), LightningEnvironment()],
        default_root_dir=out,
    )


def print_epoch(epochs: int) -> Callable[[Epoch], None]:
    """A line per epoch, above the bar where there is one."""

    def report(row: Epoch) -> None:
        tqdm.write(
            f"epoch {row.epoch}/{epochs}  loss {row.train_loss:.4f}  accuracy {row.train_accuracy:.4f}  "
            f"val loss {row.val_loss:.4f}  val accuracy {row.val_accuracy:.4f}  "
            f"{row.images_per_second:.0f} images/s"
        )

    return report


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advice: we choose the number of workers and where things are logged ourselves."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    loggers += [logging.getLogger(f"{name}.utilities.rank_zero") for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*GPU available but not used.*"):
            warnings.filterwarnings("ignore", message)
        warnings.filterwarnings("ignore", category=NotGraphedWarning)  # the last batch of an epoch may be smaller
        # Deprecations inside Lightning are not ours to mend.
        warnings.filterwarnings("ignore", category=FutureWarning, module="pytorch_lightning")
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
