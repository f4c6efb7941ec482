"""Finding nvcc, and what a binary is built for; see cuda_build.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Plants a nvidia-smi that answers with a text and a status, or takes it away; torch sees these GPUs or none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def plant(answer: str | None, status: int = 0, torch_sees: tuple[tuple[int, int], ...] = ()) -> None:
        tool = tmp_path / "tools" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.unlink(missing_ok=True)
        if answer is not None:
            tool.write_text(f"#!{sys.executable}\nimport sys\nprint({answer!r})\nsys.exit({status})\n")
            tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tool.parent))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(torch_sees))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: torch_sees[index])

    return plant


def test_gpus_are_those_of_the_driver_or_of_torch(gpus, monkeypatch):
    gpus("9.0\n9.0\n12.0\n8.6")
    assert cuda_build.visible_gpus() == ["8.6", "9.0", "12.0"]
    gpus(None, torch_sees=((9, 0), (8, 0), (9, 0)))
    assert cuda_build.visible_gpus() == ["8.0", "9.0"]
    for prose in ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "[N/A]", ""):
        gpus(prose, status=9, torch_sees=((7, 5),))
        assert cuda_build.visible_gpus() == ["7.5"]
        gpus(prose, status=9)
        assert cuda_build.visible_gpus() == []

    def broken(index):
        raise RuntimeError("CUDA unknown error")

    gpus(None, torch_sees=((9, 0),))
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert cuda_build.visible_gpus() == []


def choose(asked=None, listed="", torch_cuda="13.0", nvcc=(13, 0)):
    return cuda_build.choose_archs(asked, listed, torch_cuda, nvcc)


def test_without_a_word_the_visible_gpus_are_built_for(gpus):
    gpus("9.0\n8.0")
    choice = choose()
    assert choice.archs == "8.0;9.0"
    assert "TORCH_CUDA_ARCH_LIST" in choice.why
    assert choose(asked=True).archs == "8.0;9.0"
    assert choose(listed="native").archs == "8.0;9.0"
    gpus(None)
    choice = choose()
    assert choice.archs == ""
    every = cuda_build.DEFAULT_ARCHS[13]
    assert choice.why == f"no GPU is visible; DLFAST_CUDA=1 builds for {every}, TORCH_CUDA_ARCH_LIST chooses"


@pytest.mark.parametrize(("nvcc", "every"), [((11, 8), 11), ((12, 6), 12), ((13, 0), 13), ((14, 1), 13)])
def test_asked_for_without_a_gpu_all_are_built_for(gpus, nvcc, every):
    gpus(None)
    assert choose(asked=True, nvcc=nvcc).archs == cuda_build.DEFAULT_ARCHS[every]


def test_what_is_listed_is_built_and_what_is_refused_is_not(gpus):
    for answer in ("9.0", None):
        gpus(answer)
        for asked in (None, True):
            assert choose(asked, listed="8.0+PTX;9.0+PTX").archs == "8.0+PTX;9.0+PTX"
        assert choose(False, listed="8.0").archs == ""
        assert choose(False, nvcc=None) == cuda_build.CudaChoice("", "DLFAST_CUDA=0")


@pytest.mark.parametrize("listed", ["", "9.0"])
def test_without_a_compiler_the_cpu_is_built_for_and_the_reason_given(gpus, listed):
    gpus("9.0")
    choice = choose(listed=listed, nvcc=None)
    assert choice.archs == ""
    assert choice.why.startswith("a GPU of compute capability 9.0 is visible, but no nvcc was found")
    assert choose(listed=listed, torch_cuda=None).why.endswith("but this torch was built without CUDA")
    gpus(None)
    assert choose(listed=listed, nvcc=None).why.startswith("no GPU is visible, and no nvcc was found")
    with pytest.raises(SystemExit, match=r"DLFAST_CUDA=1, but no nvcc was found"):
        choose(asked=True, listed=listed, nvcc=None)
    with pytest.raises(SystemExit, match=r"DLFAST_CUDA=1, but this torch was built without CUDA"):
        choose(asked=True, listed=listed, torch_cuda=None)


def test_a_gpu_between_architectures_gets_ptx_of_the_one_before(gpus):
    gpus("8.7\n10.3")
    assert choose(nvcc=(12, 6)).archs == "8.6+PTX;9.0+PTX"
    gpus("9.0\n9.1")  # its own machine code and the PTX for the other in one
    assert choose().archs == "9.0+PTX"
    gpus("12.1\n12.0")
    assert choose().archs == "12.0+PTX"


def test_a_gpu_that_is_too_old_gets_no_code(gpus):
    gpus("6.1")
    choice = choose()
    assert choice.archs == ""
    assert choice.why.startswith("the visible GPU, 6.1, is too old; DLFAST_CUDA=1 builds")
    assert choose(asked=True).archs == cuda_build.DEFAULT_ARCHS[13]
    gpus("6.1\n9.0")
    assert choose().archs == "9.0"
    for answer in ("6.1", None):
        gpus(answer)
        with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST=native, but"):
            choose(listed="native")


def test_what_a_binary_holds_is_read_from_its_flags():
    flags = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_120,code=compute_120"]
    assert cuda_build.code_of(flags) == ["sm_80", "compute_120"]


def test_the_newest_architecture_of_every_toolkit_has_ptx():
    for archs in cuda_build.DEFAULT_ARCHS.values():
        assert archs.endswith("+PTX")
        assert archs.count("PTX") == 1
