"""Skips what this machine cannot run, and keeps tests from sharing torch's global settings."""

from __future__ import annotations

import os

# Idle threads of one process must not spin on the cores that the tests of another need; torch reads it when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


def pytest_collection_modifyitems(items) -> None:
    has_cuda = torch.cuda.is_available()
    emulated = has_cuda and "emulator" in torch.cuda.get_device_name()
    for item in items:
        if item.get_closest_marker("cuda") and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif item.get_closest_marker("gpu_only") and (emulated or not has_cuda):
            item.add_marker(pytest.mark.skip(reason="needs a real GPU"))
