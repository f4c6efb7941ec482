"""The CPUs that plans are tested for, on any machine: by their names in DLFAST_CPU_KIND."""

from __future__ import annotations

import os

import pytest

LEVELS = ["default", "avx2", "avx512"]
# The SIMD level of each.
KINDS = {"zen2": "avx2", "zen4": "avx512", "skylake-x": "avx512", "sapphire-rapids": "avx512", "aarch64": "default"}


def plan_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the planner choose as on a CPU of that kind, which it does at the CPU's own SIMD level only."""
    asked = os.environ.get("DLFAST_CPU_CAPABILITY")
    if asked is not None and LEVELS.index(asked) < LEVELS.index(KINDS[kind]):
        pytest.skip(f"PyTorch's kernels are at a higher SIMD level than dlfast's on {kind}")
    monkeypatch.delenv("DLFAST_ALGORITHM", raising=False)
    monkeypatch.setenv("DLFAST_CPU_KIND", kind)
