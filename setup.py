"""Builds dlfast._C, the compiled operators. Metadata is in pyproject.toml.

Environment variables read here (all optional):
  DLFAST_NATIVE=0|1     0 installs the pure PyTorch package and compiles nothing (default 1)
  DLFAST_CUDA=0|1       0 builds no CUDA code; 1 builds it, for all GPUs where none is visible and none is named
                        (default: for the GPUs that are visible, or named by TORCH_CUDA_ARCH_LIST)
  DLFAST_LINEINFO=0|1   1 keeps line numbers in CUDA code, for profilers and compute-sanitizer (default 0)
  DLFAST_SANITIZE=0|1   1 builds the C++ with AddressSanitizer and UndefinedBehaviorSanitizer, and the kernels of
                        AVX-512 in AVX2 instructions (default 0)
  TORCH_CUDA_ARCH_LIST  GPU architectures, as for any torch extension
  MAX_JOBS              parallel compilations; default: one per core and per 3 GB of available memory
"""

import json
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not look beside this file
import cuda_build  # noqa: E402

cuda_build.choose_toolkit()

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"dlfast: building needs torch in this environment ({error}). Install torch first, then\n"
        "        pip install --no-build-isolation ."
    )

WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]


def flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "1" if default else "0")
    if value not in ("0", "1"):
        sys.exit(f"dlfast: {name} must be 0 or 1, got {value!r}")
    return value == "1"


def available_gb() -> float:
    """Memory that compilers can have: what the kernel would give, the cache of files included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
        return found["MemAvailable"] / 2**20
    except (OSError, KeyError, ValueError, IndexError):
        return float("inf")  # no Linux: nothing to go by


def set_job_limit() -> None:
    if "MAX_JOBS" not in os.environ:
        by_memory = min(available_gb(), 2**10) / 3
        os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, int(by_memory))))


def sources(*suffixes: str) -> list[str]:
    found = [p.relative_to(ROOT) for s in suffixes for p in (ROOT / "csrc").rglob(f"*{s}")]
    # Those that take longest first, so that no core waits for the last of them.
    return [str(p) for p in sorted(found, key=lambda p: ("simd" not in p.parts, p))]


def native_extension(cuda: bool):
    # Warnings are errors in our own code, not in torch's headers.
    system = [arg for path in cpp_extension.include_paths() for arg in ("-isystem", path)]
    # at::parallel_for lives in a header: without OpenMP it compiles to a plain loop. The runtime is torch's own.
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() and sys.platform != "darwin" else []
    sanitize = (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if flag("DLFAST_SANITIZE", False) else []
    )
    # And with the kernels of AVX-512 in AVX2 instructions, so that every CPU with these runs them.
    level = ["-O1", "-g", "-fno-omit-frame-pointer", "-DDLFAST_WIDE_ON_AVX2"] if sanitize else ["-O3", "-g0"]
    # Python's own flags may ask for -g, which makes the library many times as large; the table of symbols stays.
    link_args = sanitize or (["-Wl,--strip-debug"] if sys.platform.startswith("linux") else [])
    # Said here, since torch before 2.14 would ask for C++17.
    compile_args = {"cxx": ["-std=c++20", *level, "-fno-math-errno", *sanitize, *openmp, *WARNINGS, *system]}
    if not cuda:
        return cpp_extension.CppExtension(
            "dlfast._C",
            sources(".cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    compile_args["cxx"].append("-DDLFAST_WITH_CUDA")
    lineinfo = ["-lineinfo"] if flag("DLFAST_LINEINFO", False) else []
    compile_args["nvcc"] = [*cuda_build.NVCC_FLAGS, *cuda_build.PACKING_FLAGS, *lineinfo]
    return cpp_extension.CUDAExtension(
        "dlfast._C",
        sources(".cpp", ".cu"),
        include_dirs=[str(ROOT / "csrc"), *cuda_build.wheel_include_dirs()],
        library_dirs=cuda_build.runtime_link_dirs(cpp_extension.CUDA_HOME, ROOT / "build"),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def cuda_choice() -> cuda_build.CudaChoice:
    return cuda_build.choose_archs(
        flag("DLFAST_CUDA", False) if "DLFAST_CUDA" in os.environ else None,
        os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        torch.version.cuda,
        cuda_build.nvcc_version(cpp_extension.CUDA_HOME),
    )


native = flag("DLFAST_NATIVE", True)
choice = cuda_choice() if native else cuda_build.CudaChoice("", "DLFAST_NATIVE=0")
cuda = choice.archs != ""
if cuda:
    os.environ["TORCH_CUDA_ARCH_LIST"] = choice.archs

BUILD_INFO = {
    "native": native,
    "cuda": cuda,
    "cuda_archs": choice.archs,
    "cuda_why": choice.why,
    "cuda_code": cuda_build.code_of(cpp_extension._get_cuda_arch_flags()) if cuda else [],
    "cuda_version": torch.version.cuda if cuda else None,
    "torch_version": torch.__version__,
}


def record_build(package: Path) -> None:
    """Lets `import dlfast` tell a missing or stale binary before it tries to load one."""
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps(BUILD_INFO, indent=2) + "\n")
    backends = "CPU" if native else "pure PyTorch only"
    if cuda:
        backends += f" + CUDA {torch.version.cuda} for {choice.archs}"
    print(f"dlfast: built for torch {torch.__version__}: {backends} ({choice.why})", flush=True)


class BuildExtension(cpp_extension.BuildExtension):
    def run(self) -> None:
        set_job_limit()
        super().run()
        record_build(ROOT / "dlfast" if self.inplace else Path(self.build_lib) / "dlfast")


class BuildPy(build_py):
    """setuptools skips build_ext where there is nothing to compile, so a pure install is recorded here."""

    def run(self) -> None:
        super().run()
        if not native:
            record_build(ROOT / "dlfast" if self.editable_mode else Path(self.build_lib) / "dlfast")


setup(
    ext_modules=[native_extension(cuda)] if native else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
)
