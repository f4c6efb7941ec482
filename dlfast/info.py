"""``dlfast info``: what a bug report needs to say about the installation and the machine.

Needs nothing but torch. Also ``python -m dlfast.info``.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import dlfast
from dlfast._native import code_for, native


def facts() -> dict[str, str]:
    """Label and value of every line.

    >>> facts()["dlfast"] == dlfast.__version__
    True
    """
    build = native.build
    return {
        "dlfast": dlfast.__version__,
        "location": str(Path(dlfast.__file__).parent),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "torch built for CUDA": torch.version.cuda or "no",
        "native operators": "loaded" if native.module is not None else f"not loaded: {native.reason}",
        "compiled backends": _backends(build),
        "built for torch": str(build.get("torch_version", "not built")),
        "CUDA architectures": str(build.get("cuda_archs") or f"none ({build.get('cuda_why', 'not built')})"),
        "SIMD level": native.module.simd_level() if native.module is not None else "none (plain PyTorch)",
        "planned for": _planned_for(),
        "PyTorch's SIMD level": torch.backends.cpu.get_cpu_capability(),
        "operating system": f"{platform.system()} {platform.release()} {platform.machine()}, {_libc()}",
        "compiler here": _first_line([os.environ.get("CXX", "c++"), "--version"]),
        "nvcc here": _nvcc(),
        "CPU": _cpu_model(),
        "threads": f"{torch.get_num_threads()} used by torch, {_usable_cpus()} available",
        "GPU": _gpus(),
    }


def _backends(build: dict[str, object]) -> str:
    if not build.get("native"):
        return "none"
    return f"CPU, CUDA {build['cuda_version']}" if build.get("cuda") else "CPU"


def _planned_for() -> str:
    kind = native.module.assumed_cpu() if native.module is not None else ""
    return f"{kind}, by DLFAST_CPU_KIND" if kind else "this CPU"


def _libc() -> str:
    return " ".join(platform.libc_ver()).strip() or "unknown C library"


def _first_line(command: list[str]) -> str:
    """Of what the tool says of itself."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not run: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else f"{command[0]} says nothing"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else "nvcc"
    if shutil.which(nvcc) is None:
        return "none"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    lines = [line.strip() for line in text.splitlines() if "release" in line]
    return lines[0] if lines else "unknown version"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            label, _, value = line.partition(":")
            if label.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        code = code_for((properties.major, properties.minor), native.build.get("cuda_code", []))
        names.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{'no kernels for it' if code is None else f'kernels for {code}'})"
        )
    return ", ".join(names)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``dlfast info`` has no options."""


def run(args: argparse.Namespace) -> int:
    """Print the facts; the exit status."""
    lines = facts()
    width = max(map(len, lines))
    for label, value in lines.items():
        print(f"{label:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    run(argparse.Namespace())
