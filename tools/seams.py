"""Which file of csrc may include what: the table of allowed folder edges, checked by the #include lines.

    python -m tools.seams          # says what breaks the table; CI runs it before the tests

Folders are layers, and what a file may see depends on what kind of file it is: a kernel body sees no Torch, no
launch and no operator, so that nvcc and a C++ compiler under sanitizers compile the same body; operators see Torch
and never a body. Every launch is followed by its check.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# The folders that each folder may include, beside itself. No arrow runs back up.
EDGES: dict[str, frozenset[str]] = {
    "core": frozenset(),
    "pool": frozenset({"core"}),
    "norm": frozenset({"core", "pool"}),
    "conv": frozenset({"core", "pool"}),
    "optim": frozenset({"core"}),
    "simd": frozenset({"core", "pool", "norm", "conv", "optim"}),
    "": frozenset({"core", "pool", "norm", "conv", "optim", "simd"}),  # library.cpp
}

STANDARD = r"[a-z_]+"  # <vector>, <cstdint>
TORCH = r"(ATen|c10|torch|pybind11)/.*"
CUDA = r"cuda_\w+\.h"


@dataclass(frozen=True)
class Kind:
    """Files by their path below csrc, and what they may include.

    Attributes:
        files: pattern of their paths.
        sees: names of the kinds that they may include.
        system: patterns of what they may include in <...>.
    """

    files: str
    sees: frozenset[str]
    system: tuple[str, ...]


def _kind(files: str, sees: str, *system: str) -> Kind:
    return Kind(files, frozenset(sees.split()), system)


# The first that fits a file counts.
KINDS: dict[str, Kind] = {
    # What every body and operator may see: plain data, arithmetic, the vocabulary of vectors and packs.
    "portability": _kind(r"core/portability\.h", "", STANDARD, CUDA),
    "check": _kind(r"core/launch_check\.h", "", r"c10/cuda/CUDAException\.h", r"c10/util/Exception\.h"),
    "torch": _kind(r"core/(checks|autograd|schema)\.h", "plain torch", STANDARD, TORCH),
    "prelude": _kind(r"core/cpu_prelude\.h", "plain", STANDARD, r"ATen/Parallel\.h", r"c10/util/(BFloat16|Half)\.h"),
    "vectors": _kind(r"core/(vec|low_precision|level|peak)\.h", "plain prelude vectors", STANDARD, r"immintrin\.h"),
    "plain": _kind(
        r"core/\w+\.h|\w+/(params|vectors|step|formats)\.h|\w+/kernels\.h|\w+/cpu/(kernels|slices|step)\.h"
        r"|conv/algorithm\.h|\w+/cuda/(kernels|step|conv_tile)\.h|simd/(kernels|speed)\.h",
        "plain portability", STANDARD,
    ),
    # Bodies: no Torch, no launch, no operator.
    "cpu body": _kind(r"\w+/cpu/\w+\.h", "plain portability prelude vectors cpu_body", STANDARD),
    "gather": _kind(r"simd/\w+\.(inc|cpp)", "plain prelude vectors cpu_body gather", STANDARD, r"ATen/Parallel\.h"),
    "cpu driver": _kind(r"\w+/cpu/\w+\.cpp", "plain", STANDARD, r"omp\.h"),
    "kernel": _kind(r"\w+/cuda/kernel_\w+\.cuh", "plain portability kernel", STANDARD),
    "launch": _kind(
        r"core/launch\.cuh|\w+/cuda/launch_\w+\.(cu|cuh|h)", "plain portability kernel launch check", STANDARD,
        r"cuda_runtime(_api)?\.h", r"c10/cuda/\w+\.h", r"c10/util/(Exception|StringUtil|Type)\.h",
    ),
    # Operators: Torch, and never a body or a launch.
    "operator": _kind(
        r"\w+/\w+\.(h|cpp)|library\.cpp", "plain portability torch operator check", STANDARD, TORCH, CUDA
    ),
}  # fmt: skip
SPELLED = {"cpu_body": "cpu body", "cpu_driver": "cpu driver"}


def kind_of(path: str) -> str | None:
    """The name of the kind that a path below csrc is of."""
    return next((name for name, kind in KINDS.items() if re.fullmatch(kind.files, path)), None)


def folder_of(path: str) -> str:
    """The layer of a path below csrc."""
    return path.split("/")[0] if "/" in path else ""


def _includes(text: str) -> Iterator[tuple[int, str, bool]]:
    """Line, what is included, whether in <...>."""
    for number, line in enumerate(text.splitlines(), 1):
        include = re.match(r'\s*#\s*include\s+([<"])([^>"]+)[>"]', line)
        if include:
            yield number, include[2], include[1] == "<"


def _may_include(path: str, kind: Kind, included: str, system: bool) -> str:
    """Why `path` may not include it; empty where it may."""
    if system:
        return "" if any(re.fullmatch(p, included) for p in kind.system) else "not for this kind of file"
    own, other = folder_of(path), folder_of(included)
    if other != own and other not in EDGES[own]:
        return f"{own or 'library'} may not see {other or 'library'}"
    seen = kind_of(included)
    if seen is None or seen not in {SPELLED.get(name, name) for name in kind.sees}:
        return f"a file of the kind '{kind_of(path)}' may not see one of the kind '{seen}'"
    if included.endswith(".inc") and own != other:
        return "an .inc belongs to its folder"
    return ""


def _unchecked_launches(text: str) -> Iterator[int]:
    """Lines of launches whose next statement is not check_launch."""
    for launch in re.finditer(r"<<<", text):
        end = re.compile(r">>>\s*\(").search(text, launch.end())
        after = text.index(";", end.end() if end else launch.end()) + 1
        if not re.match(r"\s*check_launch\(", text[after:]):
            yield text.count("\n", 0, launch.start()) + 1


def violations(path: str, text: str) -> list[str]:
    """What breaks the table in the file of that path below csrc.

    >>> violations("pool/params.h", '#include <cstdint>\\n')
    []
    >>> violations("core/math.h", '#include "conv/params.h"\\n')
    ['csrc/core/math.h:1: may not include conv/params.h: core may not see conv']
    """
    name = kind_of(path)
    if name is None or folder_of(path) not in EDGES:
        return [f"csrc/{path}: tools/seams.py knows no such kind of file"]
    found = []
    for number, included, system in _includes(text):
        if why := _may_include(path, KINDS[name], included, system):
            found.append(f"csrc/{path}:{number}: may not include {included}: {why}")
    if "<<<" in text and name != "launch":
        found.append(f"csrc/{path}: launches belong in core/launch.cuh and cuda/launch_*")
    found += [f"csrc/{path}:{line}: a launch without check_launch after it" for line in _unchecked_launches(text)]
    if "C10_CUDA_KERNEL_LAUNCH_CHECK" in text and name != "check":
        found.append(f"csrc/{path}: check_launch names the kernel, C10_CUDA_KERNEL_LAUNCH_CHECK does not")
    return found


def sources() -> dict[str, str]:
    """Every file of csrc by its path below it."""
    files = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".inc"))
    return {path.relative_to(CSRC).as_posix(): path.read_text() for path in files}


def main() -> int:
    files = sources()
    found = [line for path, text in files.items() for line in violations(path, text)]
    print("\n".join(found) if found else f"include seams hold in {len(files)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
