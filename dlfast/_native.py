"""Finds and loads the compiled operators, or says why they cannot be used.

Nothing here imports more than torch. The decision is made once, at import.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BUILD_INFO_FILE = Path(__file__).with_name("_build_info.json")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (in the source folder of dlfast)"


@dataclass(frozen=True)
class Native:
    """Outcome of loading: `module` is None when the pure PyTorch path is used, and `reason` says why."""

    module: ModuleType | None
    reason: str
    build: dict[str, Any]

    @property
    def device_types(self) -> frozenset[str]:
        """Where the compiled operators run; elsewhere the reference does."""
        if self.module is None:
            return frozenset()
        return frozenset({"cpu", "meta", "cuda"} if self.build.get("cuda") else {"cpu", "meta"})


def _read_build_info() -> dict[str, Any]:
    if not BUILD_INFO_FILE.exists():
        return {}
    info: dict[str, Any] = json.loads(BUILD_INFO_FILE.read_text())
    return info


def load() -> Native:
    """Load ``dlfast._C``. Warns once, naming cause and cure, when it should be there and is not usable."""
    build = _read_build_info()
    if os.environ.get("DLFAST_NATIVE") == "0":
        return Native(None, "switched off by DLFAST_NATIVE=0 in the environment", build)
    if not build:
        reason = "the extension was not built"
    elif not build["native"]:
        reason = "installed with DLFAST_NATIVE=0"
    elif build["torch_version"] != torch.__version__:
        reason = f"built against torch {build['torch_version']}, but torch {torch.__version__} is installed"
    else:
        try:
            return Native(importlib.import_module("dlfast._C"), "", build)
        except ImportError as error:
            reason = f"the extension failed to load: {error}"
    warnings.warn(
        f"dlfast: compiled operators are not available ({reason}); using plain PyTorch instead. "
        f"To build them: {REBUILD}",
        RuntimeWarning,
        stacklevel=3,
    )
    return Native(None, reason, build)


native = load()
NATIVE_DEVICES = native.device_types
