"""Loading the compiled part, or going on without it; and the SIMD levels of one binary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dlfast import _native
from tests.support.cpu_kinds import LEVELS
from tests.support.native import needs_native

BUILT = {"native": True, "cuda": False, "torch_version": torch.__version__}


def load_with(build: dict | None, tmp_path: Path, monkeypatch) -> _native.Native:
    file = tmp_path / "_build_info.json"
    if build is not None:
        file.write_text(json.dumps(build))
    monkeypatch.setattr(_native, "BUILD_INFO_FILE", file)
    monkeypatch.delenv("DLFAST_NATIVE", raising=False)
    return _native.load()


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (None, "not built"),
        ({**BUILT, "native": False}, "installed with DLFAST_NATIVE=0"),
        ({**BUILT, "torch_version": "1.13.0"}, r"built against torch 1\.13\.0, but torch .* is installed"),
    ],
)
def test_one_warning_names_cause_and_cure(build, cause, tmp_path, monkeypatch):
    with pytest.warns(RuntimeWarning, match=f"{cause}.*pip install --no-build-isolation") as caught:
        loaded = load_with(build, tmp_path, monkeypatch)
    assert len(caught) == 1
    assert loaded.module is None
    assert loaded.device_types == frozenset()


@needs_native
def test_a_fitting_build_loads_silently(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_with(BUILT, tmp_path, monkeypatch)
    assert loaded.module is not None
    assert "cpu" in loaded.device_types


def test_switched_off_by_the_environment_works_without_a_warning():
    code = (
        "import warnings; warnings.simplefilter('error'); import torch, dlfast;"
        "layer = dlfast.nn.ConvReLUPool2d(1, 2, 3); layer(torch.randn(1, 1, 6, 6)).sum().backward();"
        "optimizer = dlfast.optim.Adam(layer.parameters()); optimizer.step();"
        "assert layer.weight.grad is not None"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "DLFAST_NATIVE": "0"}, check=True)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_each_kind_of_problem_at_every_simd_level(level):
    """The same binary, at this machine's own level and those below it; .ci/cpus runs the whole grid there."""
    if LEVELS.index(level) > LEVELS.index(_native.native.module.simd_level()):
        pytest.skip(f"{level} is above this machine's own level")
    tests = Path(__file__).with_name("functional") / "test_conv_relu_pool.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    command += ["-k", "layouts or without_bias or float64 or tiles_of_four or same_bits or few_channels"]
    environment = {**os.environ, "DLFAST_CPU_CAPABILITY": level, "OMP_NUM_THREADS": "7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@needs_native
@pytest.mark.parametrize("level", ["sse2", "AVX2"])
def test_unknown_simd_level_is_refused(level):
    code = "import torch, dlfast; dlfast._native.native.module.simd_level()"
    environment = {**os.environ, "DLFAST_CPU_CAPABILITY": level}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"DLFAST_CPU_CAPABILITY must be default, avx2 or avx512, got {level}" in done.stderr
