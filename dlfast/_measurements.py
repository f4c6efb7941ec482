"""Keeps what was timed under ``torch.backends.cudnn.benchmark`` for the processes to come.

One JSON file for each model of GPU, in the folder that DLFAST_CACHE_DIR names. What is in it counts only for the very
same GPU, driver, libraries and build; a file of others, or a damaged one, is taken for none and written anew. Several
processes may write: each file is whole, and the last one stays, with what it found in the file before.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dlfast._native import native

FORMAT = 1
# More are not worth the time to read them. csrc/core/memo.h holds as many.
MOST = 10000

Identity = dict[str, Any]
# Seconds by the numbers of a problem; csrc/conv/measure_cuda.h tells what they are.
Found = dict[tuple[int, ...], list[float]]


def cache_dir() -> Path | None:
    """Where files are, or None where none are to be kept."""
    folder = os.environ.get("DLFAST_CACHE_DIR")
    if folder is not None:
        return Path(folder).expanduser() if folder else None
    above = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # there may be no home
        return (Path(above) if above else Path.home() / ".cache") / "dlfast"
    return None


def file_for(folder: Path, identity: Identity) -> Path:
    """
    >>> file_for(Path("cache"), {"device": "NVIDIA H100 80GB HBM3"}).name
    'NVIDIA-H100-80GB-HBM3.json'
    """
    return folder / (re.sub(r"[^A-Za-z0-9]+", "-", str(identity["device"])).strip("-") + ".json")


def read(path: Path, identity: Identity) -> Found:
    """What `path` holds for `identity`; nothing where it is not there, damaged or of another."""
    try:
        held = json.loads(path.read_text())
        entries = held["entries"]
        if held["format"] != FORMAT or held["identity"] != identity or held["crc32"] != _checksum(entries):
            return {}
        return {tuple(key): [math.inf if s is None else s for s in seconds] for key, seconds in entries}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def write(path: Path, identity: Identity, found: Found) -> None:
    """Replace `path` as a whole.

    Raises:
        OSError: it cannot be written.
    """
    # JSON has no infinity, which is what an algorithm takes that found no memory.
    entries = [[list(key), [s if math.isfinite(s) else None for s in seconds]] for key, seconds in found.items()]
    held = {"format": FORMAT, "identity": identity, "crc32": _checksum(entries), "entries": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(held, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _checksum(entries: Any) -> int:
    return zlib.crc32(json.dumps(entries).encode())


class Keeper:
    """Between the measurements of this process and the files."""

    def __init__(self, module: Any, identify: Callable[[int], Identity]) -> None:
        """`module` has ``measurements(device)``; `identify` says what its numbers are true for."""
        self._module = module
        self._identify = identify
        self._identities: dict[int, Identity] = {}
        self._saved: dict[int, int] = {}  # how many there were when they were last read or written
        self._warned = False

    def load(self, device: int) -> list[tuple[list[int], list[float]]]:
        """What earlier processes found; called once, before this one asks for anything."""
        identity = self._identities[device] = self._identify(device)
        folder = cache_dir()
        found = {} if folder is None else read(file_for(folder, identity), identity)
        self._saved[device] = len(found)
        return [(list(key), seconds) for key, seconds in found.items()]

    def save(self, device: int) -> None:
        """Write what this process found, if that is more than before."""
        folder = cache_dir()
        own = {tuple(key): seconds for key, seconds in self._module.measurements(device)}
        if folder is None or len(own) == self._saved.get(device, 0):
            return
        identity = self._identities.get(device) or self._identify(device)
        path = file_for(folder, identity)
        found = {key: seconds for key, seconds in read(path, identity).items() if key not in own} | own
        try:
            write(path, identity, dict(list(found.items())[-MOST:]))
        except OSError as error:
            self._warn(error)
        self._saved[device] = len(own)

    def save_all(self) -> None:
        for device in self._identities:
            self.save(device)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warnings.warn(
                f"dlfast: what torch.backends.cudnn.benchmark had timed is not kept for other processes: {error}. "
                "DLFAST_CACHE_DIR names another folder, or none where it is empty",
                RuntimeWarning,
                stacklevel=2,
            )
        self._warned = True


def identify(version: str, module: ModuleType, device: int) -> Identity:
    """All that decides how long something takes, or which of our kernels there are."""
    properties = torch.cuda.get_device_properties(device)
    driver, runtime = module.cuda_versions()
    return {
        "device": properties.name,
        "processors": properties.multi_processor_count,
        "driver": driver,
        "runtime": runtime,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "torch": torch.__version__,
        "dlfast": version,
        "built": Path(str(module.__file__)).stat().st_mtime_ns,  # versions do not change with every kernel
    }


def connect(version: str) -> None:
    """Let the compiled operators, those of dlfast `version`, keep what they measure."""
    module = native.module
    if module is None or not native.build.get("cuda"):
        return
    keeper = Keeper(module, lambda device: identify(version, module, device))
    module.keep_measurements(load=keeper.load, save=keeper.save)
    atexit.register(keeper.save_all)
