"""Finds and loads the compiled operators, or says why they cannot be used.

Nothing here imports more than torch. The decision is made once, at import.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import warnings
from collections.abc import Iterable
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


def warn_of_old_names() -> None:
    """Variables of the environment that have another name now; the old ones go with the next release."""
    for old, now in (("DLFAST_PLAN", "DLFAST_ALGORITHM"), ("DLFAST_PRODUCTS", "DLFAST_MATH_MODE")):
        if old in os.environ:
            warnings.warn(f"dlfast: {old} is deprecated: set {now} instead", FutureWarning, stacklevel=3)
    if "epilogue" in (os.environ.get("DLFAST_PLAN"), os.environ.get("DLFAST_ALGORITHM")):
        warnings.warn("dlfast: the algorithm 'epilogue' is called 'pytorch' now", FutureWarning, stacklevel=3)


warn_of_old_names()
native = load()
NATIVE_DEVICES = native.device_types


def runs_on(device: torch.device) -> bool:
    """Whether the compiled operators run on `device`; where not, the reference does.

    For a GPU that the build has no code for it warns once, and says how to build for it.
    """
    if device.type != "cuda" or not NATIVE_DEVICES:
        return device.type in NATIVE_DEVICES
    has_code: bool = _gpu_has_code(torch.cuda.current_device() if device.index is None else device.index)
    return has_code


def _gpu_has_code(index: int) -> bool:
    return _look_for_code(index)


# What torch.compiler.assume_constant_result does, which would import all of torch._dynamo with dlfast.
_gpu_has_code._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _look_for_code(index: int) -> bool:
    capability = torch.cuda.get_device_capability(index)
    code = native.build.get("cuda_code", [])
    if code_for(capability, code) is not None:
        return True
    version = ".".join(map(str, capability))
    held = f"holds CUDA code for {', '.join(code)}, none of which runs on" if code else "holds no CUDA code for"
    warnings.warn(
        f"dlfast: this build {held} "
        f"{torch.cuda.get_device_name(index)} (compute capability {version}); using plain PyTorch there instead. "
        f"To build for it: TORCH_CUDA_ARCH_LIST={version} {REBUILD}",
        RuntimeWarning,
        stacklevel=5,
    )
    return False


def code_for(capability: tuple[int, int], code: Iterable[str]) -> str | None:
    """Which of `code` a GPU of that compute capability runs, or None.

    Machine code (sm_86) runs on GPUs of its major version whose minor one is not lower, and where its name ends in
    "a" only on exactly its own; PTX (compute_90) is compiled by the driver for any later GPU.

    >>> code_for((8, 9), ["sm_80", "sm_86", "sm_90", "compute_90"])
    'sm_86'
    >>> code_for((12, 0), ["sm_80", "sm_90", "compute_90"])
    'compute_90'
    >>> code_for((7, 5), ["sm_80", "compute_80"]) is None
    True
    """
    fitting = []
    for name in code:
        kind, major, minor, suffix = _parts(name)
        own = (major, minor)
        if suffix == "a":
            fits = own == capability
        elif kind == "sm" or suffix == "f":
            fits = major == capability[0] and own <= capability
        else:
            fits = own <= capability
        if fits:
            fitting.append((kind == "sm", own, name))
    return max(fitting)[2] if fitting else None


def _parts(name: str) -> tuple[str, int, int, str]:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
    if match is None:
        raise ValueError(f"not a CUDA architecture: {name!r}")
    return match[1], int(match[2]), int(match[3]), match[4]
