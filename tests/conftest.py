"""Skips what this machine cannot run, and refuses to compare the reference with itself unasked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# Idle threads of one process must not spin on the cores that the tests of another need; torch reads it when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What tests time, on an emulator perhaps, is nothing that others should go by.
os.environ["DLFAST_CACHE_DIR"] = ""

import pytest
import torch

import dlfast
from dlfast._native import REBUILD, Native, native


def not_tested(loaded: Native, imported: Path, environment: Mapping[str, str]) -> str | None:
    """Why a run would pass without testing what it was asked to, or None.

    Without the compiled operators the layers and the reference are one, and every comparison holds. And pytest may put
    this folder before the one that PYTHONPATH names, which then is not tested.
    """
    folders = [Path(folder) for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    asked = next((folder for folder in folders if (folder / "dlfast" / "__init__.py").exists()), None)
    if asked is not None and asked.resolve() != imported.resolve():
        return f"these tests import dlfast from {imported}, but PYTHONPATH names {asked}: try --import-mode=append"
    if loaded.module is None and environment.get("DLFAST_NATIVE") != "0":
        return (
            f"the compiled operators are not loaded ({loaded.reason}), so that the reference would be compared with "
            f"itself. To build them: {REBUILD}. To test the reference alone, set DLFAST_NATIVE=0"
        )
    return None


def pytest_configure() -> None:
    if reason := not_tested(native, Path(dlfast.__file__).parents[1], os.environ):
        raise pytest.UsageError(reason)


def pytest_collection_modifyitems(items) -> None:
    has_cuda = torch.cuda.is_available()
    emulated = has_cuda and "emulator" in torch.cuda.get_device_name()
    for item in items:
        if item.get_closest_marker("cuda") and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif item.get_closest_marker("gpu_only") and (emulated or not has_cuda):
            item.add_marker(pytest.mark.skip(reason="needs a real GPU"))
