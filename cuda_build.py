"""What building the CUDA side takes: the toolkit, the compiler's flags, the architectures.

setup.py builds the extension with it and .ci/inspect_cuda its machine code, so that what is inspected is what
is shipped. Call `choose_toolkit` before torch.utils.cpp_extension is imported: that looks for a toolkit itself.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

USUAL_TOOLKIT = Path("/usr/local/cuda")
NVCC_FLAGS = ["-O3", "-lineinfo", "-DDLFAST_WITH_CUDA", "-Werror", "all-warnings"]
# The newest architecture also gets PTX, so that later GPUs can run the binary.
DEFAULT_ARCHS = {
    11: "7.5;8.0;8.6+PTX",
    12: "7.5;8.0;8.6;8.9;9.0+PTX",
    13: "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX",
}


def wheel_folders() -> list[Path]:
    """The folders that NVIDIA's wheels install side by side: nvidia/cu13, nvidia/cudnn ..."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return [folder for root in roots for folder in sorted(Path(root).iterdir()) if folder.is_dir()]


def toolkit_of_nvcc() -> Path | None:
    """The toolkit that nvcc on PATH belongs to, as nvcc says itself: what is on PATH may be a link or a wrapper."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr + said.stdout, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


def find_toolkit() -> Path | None:
    """On PATH, in the usual place, or from the wheels of the extra cuda-build."""
    elsewhere = [USUAL_TOOLKIT, *wheel_folders()]
    return toolkit_of_nvcc() or next((folder for folder in elsewhere if (folder / "bin" / "nvcc").exists()), None)


def choose_toolkit() -> None:
    if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and (toolkit := find_toolkit()):
        os.environ["CUDA_HOME"] = str(toolkit)


def nvcc_version(cuda_home: str | None) -> tuple[int, int] | None:
    """Of the nvcc in that toolkit, or None where there is none."""
    if cuda_home is None or not (nvcc := Path(cuda_home) / "bin" / "nvcc").exists():
        return None
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", out)
    return (int(release[1]), int(release[2])) if release else None


def wheel_include_dirs() -> list[str]:
    """Headers that ATen wants and a bare toolkit lacks (cusparse.h ...), from the wheels torch installed."""
    return [str(folder / "include") for folder in wheel_folders() if (folder / "include").is_dir()]


def runtime_link_dirs(cuda_home: str, build: Path) -> list[str]:
    """Where the linker finds libcudart.so for a toolkit from wheels, which hold only libcudart.so.13."""
    lib = Path(cuda_home) / "lib"
    runtimes = sorted(lib.glob("libcudart.so.*"))
    if (Path(cuda_home) / "lib64").is_dir() or (lib / "libcudart.so").exists() or not runtimes:
        return []
    link = build / "cudart" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(runtimes[-1])
    return [str(link.parent)]


def code_of(gencode_flags: list[str]) -> list[str]:
    """What a binary built with these flags holds: machine code as sm_80, PTX as compute_80."""
    return [code for flag in gencode_flags for code in re.findall(r",code=(\w+)", flag)]
