"""What gpu_check says of the device and the sources: why there is nothing to check, and which commit it is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dlfast._native import native
from tools.cuda.gpu_check import device


@pytest.mark.parametrize(
    ("build", "available", "wanted", "why"),
    [
        ({"cuda": False}, True, ["tests"], "built without CUDA"),
        ({"cuda": True}, False, ["tests"], "no CUDA device"),
        ({"cuda": True}, True, ["tests", "blocks"], "the emulator"),
        ({"cuda": True}, True, ["tests"], None),
    ],
)
def test_what_is_lacking_is_named(build, available, wanted, why, monkeypatch):
    monkeypatch.setattr(device, "native", native.__class__(sys, "", build))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "CUDA emulator (sm_80)")
    said = device.lacking(wanted)
    assert (why is None and said is None) or why in said


def git(folder, *arguments):
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_tells_changes_apart(tmp_path):
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("one")
    alone = device.commit(tmp_path)
    assert alone.startswith("no repository, sources ")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert device.commit(tmp_path) == head
    source.write_text("two")
    changed = device.commit(tmp_path)
    assert changed.startswith(f"{head}, sources ")
    source.write_text("three")
    assert device.commit(tmp_path) != changed
