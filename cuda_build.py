"""What building the CUDA side takes: the toolkit, the compiler's flags, the architectures.

setup.py builds the extension with it and the inspection of machine code uses the same flags, so that what is inspected
is what is shipped. Call `choose_toolkit` before torch.utils.cpp_extension is imported: that looks for a toolkit itself.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

USUAL_TOOLKIT = Path("/usr/local/cuda")
# What decides about the machine code.
NVCC_FLAGS = ["-std=c++20", "-O3", "-DDLFAST_WITH_CUDA", "-Werror", "all-warnings"]
# And how it is packed into the library.
PACKING_FLAGS = ["-Xfatbin=-compress-all"]
# What is built where nothing else is asked for and no GPU is visible: one binary for all GPUs, as wheels have it. The
# newest architecture also gets PTX, so that later GPUs can run the binary.
DEFAULT_ARCHS = {
    11: "7.5;8.0;8.6+PTX",
    12: "7.5;8.0;8.6;8.9;9.0+PTX",
    13: "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX",
}


@dataclass(frozen=True)
class CudaChoice:
    """For which GPUs CUDA code is built, as TORCH_CUDA_ARCH_LIST names them ("": none), and why, in a few words."""

    archs: str
    why: str


def choose_archs(asked: bool | None, listed: str, torch_cuda: str | None, nvcc: tuple[int, int] | None) -> CudaChoice:
    """What the environment asks for (DLFAST_CUDA, or None; TORCH_CUDA_ARCH_LIST, or ""); else the GPUs that are here.

    Ends the program where CUDA is asked for and cannot be built.
    """
    if asked is False:
        return CudaChoice("", "DLFAST_CUDA=0")
    if torch_cuda is None or nvcc is None:
        no_nvcc = "no nvcc was found (CUDA_HOME, PATH, or the extra cuda-build)"
        lacking = "this torch was built without CUDA" if torch_cuda is None else no_nvcc
        if asked:
            sys.exit(f"dlfast: DLFAST_CUDA=1, but {lacking}")
        gpus = visible_gpus()
        seen = f"a GPU of compute capability {' and '.join(gpus)} is visible, but" if gpus else "no GPU is visible, and"
        return CudaChoice("", f"{seen} {lacking}")
    every = DEFAULT_ARCHS.get(nvcc[0], DEFAULT_ARCHS[max(DEFAULT_ARCHS)])
    if listed and listed != "native":
        return CudaChoice(listed, "TORCH_CUDA_ARCH_LIST")
    gpus = visible_gpus()
    if own := archs_of(gpus, every):
        return CudaChoice(own, f"what the visible GPU needs, {' and '.join(gpus)}; TORCH_CUDA_ARCH_LIST chooses others")
    seen = f"the visible GPU, {' and '.join(gpus)}, is too old" if gpus else "no GPU is visible"
    if listed == "native":
        sys.exit(f"dlfast: TORCH_CUDA_ARCH_LIST=native, but {seen}")
    if asked:
        return CudaChoice(every, "DLFAST_CUDA=1; TORCH_CUDA_ARCH_LIST chooses others")
    return CudaChoice("", f"{seen}; DLFAST_CUDA=1 builds for {every}, TORCH_CUDA_ARCH_LIST chooses")


def visible_gpus() -> list[str]:
    """Compute capabilities of the GPUs in this machine, as "9.0", each once: as nvidia-smi has them, else torch."""
    return _gpus_of_driver() or _gpus_of_torch()


def _gpus_of_driver() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    # Without a driver, or where it is too old to know the question, it answers in prose.
    return in_order(line.strip() for line in said.splitlines())


def _gpus_of_torch() -> list[str]:
    import torch

    try:
        found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    except RuntimeError:  # a driver that does not start
        return []
    return in_order(f"{major}.{minor}" for major, minor in found)


def in_order(names: Iterable[str]) -> list[str]:
    """Those that are compute capabilities, each once, the oldest first."""
    return sorted({name for name in names if re.fullmatch(r"\d+\.\d", name)}, key=number)


def number(arch: str) -> tuple[int, int]:
    major, minor = arch.removesuffix("+PTX").split(".")
    return int(major), int(minor)


def archs_of(gpus: list[str], every: str) -> str:
    """The part of `every` that these GPUs need, or "". A GPU that is not in it runs the PTX of the newest before it."""
    known = [arch.removesuffix("+PTX") for arch in every.split(";")]
    chosen: dict[str, str] = {}
    for gpu in gpus:
        older = [arch for arch in known if number(arch) <= number(gpu)]
        if older and older[-1] == gpu:
            chosen.setdefault(gpu, gpu)
        elif older:
            chosen[older[-1]] = f"{older[-1]}+PTX"
    return ";".join(chosen[arch] for arch in known if arch in chosen)


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
