"""Finding nvcc, and what a binary is built for; see cuda_build.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import cuda_build


def fake_toolkit(folder: Path, release: str = "13.0") -> Path:
    """A toolkit whose nvcc tells its version and, asked for a dry run, where it is."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"#!{sys.executable}\nimport sys\nversion = 'Cuda compilation tools, release {release}, V{release}.1'\n"
        f"print('#$ TOP={folder}' if '--dryrun' in sys.argv else version)\n"
    )
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(cuda_build, "USUAL_TOOLKIT", tmp_path / "usual")
    monkeypatch.setattr(cuda_build, "wheel_folders", lambda: [tmp_path / "cudnn", tmp_path / "cu13"])


def test_toolkits_are_found_in_order(nothing_installed, monkeypatch, tmp_path):
    assert cuda_build.find_toolkit() is None
    fake_toolkit(tmp_path / "cu13")
    assert cuda_build.find_toolkit() == tmp_path / "cu13"
    fake_toolkit(tmp_path / "usual")
    assert cuda_build.find_toolkit() == tmp_path / "usual"
    on_path = fake_toolkit(tmp_path / "own")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(on_path / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    assert cuda_build.find_toolkit() == on_path.resolve()


def test_a_toolkit_that_was_asked_for_is_left(nothing_installed, monkeypatch, tmp_path):
    fake_toolkit(tmp_path / "cu13")
    monkeypatch.setenv("CUDA_HOME", "/asked/for")
    cuda_build.choose_toolkit()
    assert os.environ["CUDA_HOME"] == "/asked/for"
    monkeypatch.delenv("CUDA_HOME")
    cuda_build.choose_toolkit()
    assert os.environ["CUDA_HOME"] == str(tmp_path / "cu13")


def test_versions_of_nvcc(tmp_path):
    assert cuda_build.nvcc_version(str(fake_toolkit(tmp_path / "a", "13.2"))) == (13, 2)
    assert cuda_build.nvcc_version(str(tmp_path)) is None
    assert cuda_build.nvcc_version(None) is None


def test_the_runtime_of_wheels_gets_a_link_outside_of_them(tmp_path):
    home, build = tmp_path / "cu13", tmp_path / "build"
    (home / "lib").mkdir(parents=True)
    assert cuda_build.runtime_link_dirs(str(home), build) == []
    runtime = home / "lib" / "libcudart.so.13"
    runtime.write_text("runtime")
    for _ in range(2):  # also where the link is there already
        (folder,) = cuda_build.runtime_link_dirs(str(home), build)
        assert (Path(folder) / "libcudart.so").resolve() == runtime
    assert [file.name for file in (home / "lib").iterdir()] == ["libcudart.so.13"]
    (home / "lib" / "libcudart.so").symlink_to(runtime)
    assert cuda_build.runtime_link_dirs(str(home), build) == []


def test_what_a_binary_holds_is_read_from_its_flags():
    flags = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_120,code=compute_120"]
    assert cuda_build.code_of(flags) == ["sm_80", "compute_120"]


def test_the_newest_architecture_of_every_toolkit_has_ptx():
    for archs in cuda_build.DEFAULT_ARCHS.values():
        assert archs.endswith("+PTX")
        assert archs.count("PTX") == 1
