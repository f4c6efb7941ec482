"""The instructions of the compiled kernels, which tell on any x86-64 what a CPU with AVX-512 would run."""

from __future__ import annotations

import collections
import functools
import platform
import re
import shutil
import subprocess

import pytest

from dlfast._native import native
from tests.support.native import needs_native

pytestmark = [
    needs_native,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="has one SIMD level"),
    pytest.mark.skipif(not (shutil.which("objdump") and shutil.which("nm")), reason="needs objdump and nm of binutils"),
]
REGISTER = re.compile(r"%([yz])mm")
MULTIPLY_ADD = re.compile(r"\bvfn?m(add|sub)\d+p")
LEVELS = ("8portable", "4avx2", "6avx512")  # namespaces, as the compiler mangles them


def tool(*command: str) -> list[str]:
    done = subprocess.run([*command, native.module.__file__], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@functools.cache
def counts() -> dict[str, collections.Counter[str]]:
    """Of each function: instructions on wide registers ("y", "z"), and multiply-adds on them ("y fma", "z fma")."""
    found: dict[str, collections.Counter[str]] = {}
    for line in tool("objdump", "-d", "--no-show-raw-insn", "-j", ".text"):
        if line.endswith(">:"):
            here = found.setdefault(line.partition("<")[2][:-2], collections.Counter())
        elif register := REGISTER.search(line):
            width = "z" if "%zmm" in line else register[1]
            here[width] += 1
            here[f"{width} fma"] += bool(MULTIPLY_ADD.search(line))
    return found


@pytest.mark.parametrize("kernel", [
    "row_2x2", "band_convolution", "multiply_block", "transform_input", "transform_output", "grad_weight_with",
    "Scatter", "multiply_adds",
])  # fmt: skip
def test_kernels_compute_in_the_registers_of_their_level(kernel):
    for level, width, other in [("4avx2", "y", "z"), ("6avx512", "z", "y")]:
        of_kernel = [count for name, count in counts().items() if level in name and f"{len(kernel)}{kernel}" in name]
        total = sum(of_kernel, collections.Counter())
        assert total[f"{width} fma"] > 0
        assert total[f"{other} fma"] == 0


def test_what_all_levels_share_runs_on_every_cpu():
    """The linker keeps one copy of an inline function, whichever file it comes from."""
    merged = {line.split()[-1] for line in tool("nm") if line.split()[-2] in "WVu"}
    shared = [name for name in counts().keys() & merged if not any(level in name for level in LEVELS)]
    assert len(shared) > 100
    assert [name for name in shared if counts()[name]["y"] or counts()[name]["z"]] == []
