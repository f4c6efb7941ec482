"""A run that would compare the reference with itself, or test another dlfast than was asked for, fails at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dlfast._native import Native
from tests.conftest import not_tested

ROOT = Path(__file__).resolve().parents[1]
LOADED = Native(ModuleType("extension"), "", {})
MISSING = Native(None, "the extension failed to load: no such symbol", {"native": True})
# Runs pytest where the extension, there or not, was not loaded.
WITHOUT = f"""
import sys
import pytest
from dlfast import _native
_native.native = _native.Native(None, {MISSING.reason!r}, {{"native": True}})
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def other_copy(folder: Path) -> Path:
    (folder / "dlfast").mkdir()
    (folder / "dlfast" / "__init__.py").touch()
    return folder


def test_what_is_loaded_is_tested(tmp_path):
    assert not_tested(LOADED, ROOT, {}) is None
    assert not_tested(LOADED, ROOT, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}) is None
    assert not_tested(LOADED, ROOT, {"DLFAST_NATIVE": "1"}) is None


def test_the_reference_is_tested_alone_where_that_was_asked_for():
    assert not_tested(MISSING, ROOT, {"DLFAST_NATIVE": "0"}) is None


@pytest.mark.parametrize("environment", [{}, {"DLFAST_NATIVE": "1"}], ids=str)
def test_a_missing_extension_is_named_with_its_cure(environment):
    said = not_tested(MISSING, ROOT, environment)
    for part in (MISSING.reason, "pip install", "DLFAST_NATIVE=0"):
        assert part in said


def test_another_copy_than_was_asked_for_is_named(tmp_path):
    said = not_tested(LOADED, ROOT, {"PYTHONPATH": str(other_copy(tmp_path))})
    assert str(tmp_path) in said
    assert str(ROOT) in said


@pytest.mark.parametrize("parallel", [[], ["-n", "1"]], ids=["alone", "parallel"])
def test_a_run_without_the_extension_fails_at_once(parallel):
    environment = {name: value for name, value in os.environ.items() if name != "DLFAST_NATIVE"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *parallel, "tests/test_layers.py"], cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert MISSING.reason in done.stderr + done.stdout
    assert " passed" not in done.stdout


def test_a_run_of_the_reference_alone_runs():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layers.py"], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DLFAST_NATIVE": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
