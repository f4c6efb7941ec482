"""The GPU, what it is checked with, and why there may be nothing to check."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import dlfast.info
from dlfast._native import native
from tools.cuda.gpu_check.process import ROOT
from tools.cuda.gpu_check.results import Key

SOURCES = ("csrc", "dlfast", "tests", "tools")
SUFFIXES = (".py", ".cpp", ".h", ".inc", ".cu", ".cuh")


def emulated() -> bool:
    return torch.cuda.is_available() and "emulator" in torch.cuda.get_device_name()


def lacking(verbs: Sequence[str]) -> str | None:
    """Why nothing can be checked here, or None."""
    if native.module is None:
        return f"the extension is not loaded ({native.reason})"
    if not native.build.get("cuda"):
        return "the extension was built without CUDA; build it where nvcc is, or with the extra cuda-build"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if emulated() and list(verbs) != ["tests"]:
        return "this is the emulator, which runs the verb tests alone"
    return None


def facts() -> dict[str, str]:
    """What figures depend on."""
    properties = torch.cuda.get_device_properties(0)
    found = {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory, bytes": str(properties.total_memory),
        "cuDNN": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }
    if shutil.which("nvidia-smi"):
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu,utilization.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
        said = subprocess.run(command, capture_output=True, text=True)
        found |= dict(zip(query.split(","), said.stdout.strip().split(", "), strict=False))
    return {**dlfast.info.facts(), **found}


def key_of(found: dict[str, str]) -> Key:
    return Key(found["GPU"], found.get("driver_version", "unknown"), torch.__version__, commit(ROOT))


def commit(root: Path) -> str:
    """The commit of `root`; where files differ from it, or there is no repository, also a digest of the sources."""
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *SOURCES)
    if head is not None and changes == "":
        return head
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in SUFFIXES:
                digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{head or 'no repository'}, sources {digest.hexdigest()[:16]}"


def _git(root: Path, *arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
