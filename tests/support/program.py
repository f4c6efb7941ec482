"""Helpers of the tests that run the program: small settings, the state of a run, and a process of its own."""

import csv
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from dlfast.app.train import TrainConfig

ROOT = Path(__file__).parents[2]
TIMINGS = ("images_per_second", "seconds")


def small(out=None, **options):
    """mnistnet on the digits as they are, 8x8: an epoch is 20 steps and takes a fraction of a second."""
    return TrainConfig(
        **{"network": "mnistnet", "input_size": (8, 8), "epochs": 3, "progress": False, "out": out} | options
    )


def rows(out):
    """metrics.csv without what the clock decides."""
    with open(out / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def history(result):
    return [{k: v for k, v in asdict(row).items() if k not in TIMINGS} for row in result.history]


def state(path):
    """Weights and optimizer state of a checkpoint, as a flat list of tensors."""
    checkpoint = torch.load(path, weights_only=True)
    tensors = list(checkpoint["state_dict"].values())
    for optimizer in checkpoint["optimizer_states"]:
        for slots in optimizer["state"].values():
            tensors += [torch.as_tensor(value) for value in slots.values()]
    assert len(tensors) > 8
    return tensors


def assert_same_run(out, other):
    """Bit for bit, but for the clock."""
    assert rows(out) == rows(other)
    for name in ("last.ckpt", "best.ckpt"):
        for a, b in zip(state(out / name), state(other / name), strict=True):
            assert torch.equal(a, b)
    assert [p.name for p in out.iterdir() if p.suffix == ".tmp"] == []


def python(*arguments, timeout=120, **options):
    """A Python process that finds this dlfast; its outputs are text."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore:dlfast:RuntimeWarning",  # where the native operators were not built
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=timeout, **options,
    )  # fmt: skip


def dlfast(*arguments, **options):
    return python("-m", "dlfast", *arguments, **options)
