"""Looks at the machine code of every CUDA kernel, and fails where it is not what the marks in the source say.

usage: python -m tools.cuda.inspection [--archs 80 90] [--jobs N] [--write] [FILE.cu ...]

Compiles every csrc/**/*.cu to a cubin per architecture with the flags of setup.py, and checks each instantiation
of each kernel: no stack frame, no spill, no local memory access; registers and shared memory within the budget and
the instructions there that the marks ask for (tools/cuda/marks.py says what a mark is); and that docs/cuda-occupancy.md
is what cuda_occupancy.h gives for this code (--write writes it). What has not changed is not compiled again: cubins
stay in build/inspect. Also checks that the extension built here holds the machine code and PTX it was asked for.

Needs nvcc, and cuobjdump with nvdisasm from the extra dev.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_build
from tools.cuda.machine_code import LOCAL_ACCESSES, Function, demangled, read_cubin
from tools.cuda.marks import Budget, Kernel, MarkError, kernels_of
from tools.cuda.occupancy import blocks_per_sm, occupancy

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "inspect"
WITHOUT_MARKS = re.compile(r"^\s*// inspect.*\n", re.MULTILINE)
TABLE = ROOT / "docs" / "cuda-occupancy.md"


@dataclass(frozen=True)
class Row:
    """An instantiation on an architecture: what is in the table."""

    kernel: str
    variant: str
    arch: int
    registers: int
    static: int
    dynamic: int
    threads: int


def tool(name: str) -> Path:
    """cuobjdump: from PATH, the toolkit, or the wheels of the extra dev."""
    folders = [Path(os.environ["CUDA_HOME"]), *cuda_build.wheel_folders()]
    places = [Path(on_path)] if (on_path := shutil.which(name)) else []
    places += [folder / "bin" / name for folder in folders]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        sys.exit(f"inspection: no {name}: install the extra dev (nvidia-cuda-{name}), or put a CUDA toolkit on PATH")
    return found


def compile_cubin(source: Path, arch: int) -> tuple[Path, str]:
    """The cubin of a file, and what ptxas said; from build/inspect where nothing it depends on has changed."""
    from torch.utils import cpp_extension

    name = "-".join([*source.relative_to(ROOT).parent.parts[1:], source.stem, f"sm_{arch}"])
    cubin, log, known, deps = (BUILD / f"{name}.{end}" for end in ("cubin", "log", "key", "d"))
    includes = [str(ROOT / "csrc"), *cuda_build.wheel_include_dirs()]
    command = [
        str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"), "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v",
        *cpp_extension.COMMON_NVCC_FLAGS, *cuda_build.NVCC_FLAGS,
        *(f"-I{folder}" for folder in includes),
        *(arg for folder in cpp_extension.include_paths() for arg in ("-isystem", folder)),
    ]  # fmt: skip
    if not (cubin.exists() and known.exists() and known.read_text() == key(command, deps)):
        known.unlink(missing_ok=True)
        command_line = [*command, "-MD", "-MF", str(deps), str(source), "-o", str(cubin)]
        done = subprocess.run(command_line, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"inspection: {source.relative_to(ROOT)} does not compile for sm_{arch}:\n{done.stderr[-4000:]}")
        log.write_text(done.stdout + done.stderr)
        known.write_text(key(command, deps))
    return cubin, log.read_text()


def key(command: list[str], deps: Path) -> str:
    """Of everything a cubin depends on: the command, the compiler, our own files, and which others were read."""
    digest = hashlib.sha256(repr((command, nvcc_version())).encode())
    for file in sorted(deps.read_text().replace("\\\n", " ").partition(":")[2].split()) if deps.exists() else []:
        path = Path(file)
        digest.update(file.encode())
        if path.is_relative_to(ROOT) or not path.is_absolute():
            text = (ROOT / path).read_text() if (ROOT / path).exists() else "missing"
            digest.update(WITHOUT_MARKS.sub("", text).encode())  # a budget changes no code
    return digest.hexdigest()


def nvcc_version() -> str:
    version = cuda_build.nvcc_version(os.environ.get("CUDA_HOME"))
    return "none" if version is None else f"{version[0]}.{version[1]}"


def faults(name: str, function: Function, budget: Budget) -> list[str]:
    """Where an instantiation is not what its marks say."""
    usage = function.usage
    found = []
    if usage.stack or usage.spilled:
        found.append(f"{usage.stack} bytes of stack, {usage.spilled} bytes spilled")
    found += [f"local memory is accessed: {op}" for op in LOCAL_ACCESSES if function.holds(op)]
    if usage.registers > budget.registers:
        found.append(f"{usage.registers} registers, the budget is {budget.registers}")
    if usage.static > budget.static:
        found.append(f"{usage.static} bytes of static shared memory, the budget is {budget.static}")
    if not function.instructions:
        found.append("cuobjdump shows no instructions")
    if function.threads == 0:
        found.append("no __launch_bounds__")
    found += [f"no {wanted}" for wanted in budget.holds if not function.holds(wanted)]
    if budget.loop and not function.loop_holds(budget.loop):
        found.append(f"no loop holds all of {' '.join(budget.loop)}")
    return [f"{name}: {fault}" for fault in found]


def inspect(source: Path, arch: int, kernels: list[Kernel], cuobjdump: Path) -> tuple[list[Row], list[str]]:
    """Rows for the table, and faults, of one file on one architecture."""
    cubin, log = compile_cubin(source, arch)
    functions = read_cubin(cubin, log, cuobjdump)
    names = demangled([function.mangled for function in functions])
    rows, found = [], []
    for function in functions:
        name = names[function.mangled]
        own = re.match(r"\w+", name)
        kernel = next((kernel for kernel in kernels if own and kernel.name == own[0]), None)
        if kernel is None:
            raise MarkError(f"{source.relative_to(ROOT)}: {name} is in the cubin, but no __global__ of that name here")
        budget = kernel.budget(name, arch)
        found += [f"{kernel.place} sm_{arch} {fault}" for fault in faults(name, function, budget)]
        usage = function.usage
        variant = re.sub(r"^\w+<(.*)>$", r"\1", name)
        rows.append(
            Row(kernel.name, variant, arch, usage.registers, usage.static, budget.dynamic, max(function.threads, 1))
        )
    return rows, found


def table(rows: list[Row], archs: list[int]) -> str:
    """Markdown: a line per kernel and what its first template argument is called, the worst instantiation of each."""
    launches = [(r.arch, r.registers, r.static, r.dynamic, r.threads) for r in rows]
    blocks = blocks_per_sm(launches, Path(os.environ["CUDA_HOME"]), BUILD)
    groups: dict[tuple[str, str], list[tuple[Row, int]]] = {}
    for row, count in zip(rows, blocks, strict=True):
        first = re.match(r"[\w:]+", row.variant)
        groups.setdefault((row.kernel, first[0] if first else row.variant), []).append((row, count))
    lines = [
        "# Registers and occupancy of the CUDA kernels",
        "",
        "Written by `python -m tools.cuda.inspection --write`, checked by CI: computed from machine code by NVIDIA's",
        "`cuda_occupancy.h`, not measured. A line is a kernel with the body or algorithm it is instantiated for; over",
        "its instantiations (types, windows ...) a cell has the most registers of a thread and the fewest warps that a",
        "multiprocessor holds, with their part of what it could hold. Shared memory is what the marks reckon with.",
        "",
        f"nvcc {nvcc_version()}.",
        "",
        "| kernel | of | instantiations | threads | shared KiB | " + " | ".join(f"sm_{a}" for a in archs) + " |",
        "|---|---|---|---|---|" + "---|" * len(archs),
    ]
    for (kernel, name), members in sorted(groups.items()):
        cells = []
        for arch in archs:
            of_arch = [(row, count) for row, count in members if row.arch == arch]
            warps = [(count * row.threads // 32, occupancy(arch, count, row.threads)) for row, count in of_arch]
            most = max((row.registers for row, _ in of_arch), default=0)
            cells.append(f"{most}: {min(warps)[0]} ({min(warps)[1]:.0%})" if warps else "-")
        variants = len({row.variant for row, _ in members})
        threads = "/".join(map(str, sorted({row.threads for row, _ in members})))
        shared = max(row.static + row.dynamic for row, _ in members) / 1024
        lines.append(f"| {kernel} | {name} | {variants} | {threads} | {shared:.3g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def check_binary(cuobjdump: Path) -> list[str]:
    """Whether the extension built in this folder holds the code that its build was asked for."""
    record, binaries = ROOT / "dlfast" / "_build_info.json", sorted((ROOT / "dlfast").glob("_C*.so"))
    built = json.loads(record.read_text()) if record.exists() else {}
    if not built.get("cuda") or not binaries:
        print("no extension with CUDA is built in this folder: its slices are not checked")
        return []
    listed = ""
    for option in ("--list-elf", "--list-ptx"):
        listed += subprocess.run([cuobjdump, option, binaries[-1]], capture_output=True, text=True).stdout
    holds = set(re.findall(r"\b(sm_\d+\w?)\.cubin", listed))
    holds |= {f"compute_{arch}" for arch in re.findall(r"\bsm_(\d+\w?)\.ptx", listed)}
    missing = set(built["cuda_code"]) - holds
    print(f"{binaries[-1].name} holds {', '.join(sorted(holds))}")
    return [f"{binaries[-1].name} was built for {code}, but does not hold it" for code in sorted(missing)]


def check_table(text: str, write: bool) -> list[str]:
    """The committed table may have more architectures than were looked at now, or fewer: those of both must agree."""
    name = TABLE.relative_to(ROOT)
    committed = TABLE.read_text() if TABLE.exists() else ""
    if write:
        TABLE.write_text(text)
        print(f"written: {name}")
    elif committed and f"nvcc {nvcc_version()}." not in committed:
        print(f"{name} was written with another nvcc than {nvcc_version()}: not compared")
    elif columns(committed, text) != columns(text, committed):
        return [f"{name} is not what this code gives: write it with python -m tools.cuda.inspection --write"]
    return []


def columns(table: str, other: str) -> list[list[str]]:
    """The cells of a table, without the architectures that the other one does not have."""

    def cells(text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    own, theirs = cells(table), cells(other)
    if not own or not theirs:
        return own
    kept = [n for n, head in enumerate(own[0]) if not head.startswith("sm_") or head in theirs[0]]
    return [[row[n] for n in kept] for row in own]


def main() -> int:
    cuda_build.choose_toolkit()
    every = [int(arch.replace(".", "")) for arch in re.findall(r"\d+\.\d+", cuda_build.DEFAULT_ARCHS[13])]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="(default: every csrc/**/*.cu)")
    parser.add_argument("--archs", type=int, nargs="+", choices=every, default=every, help="(default: all)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="(default: one per core)")
    parser.add_argument("--write", action="store_true", help="write docs/cuda-occupancy.md")
    args = parser.parse_args()
    if args.write and args.files:
        parser.error("--write needs all files")
    if nvcc_version() == "none":
        sys.exit("inspection: no nvcc: put a CUDA toolkit on PATH, or install the extra cuda-build")
    cuobjdump = tool("cuobjdump")
    tool("nvdisasm")  # cuobjdump calls it for machine code
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [file.resolve() for file in args.files] or sorted((ROOT / "csrc").rglob("*.cu"))
    try:
        found = [(source, kernels_of(source, ROOT)) for source in sources]
        tasks = [(source, arch, kernels, cuobjdump) for source, kernels in found for arch in args.archs if kernels]
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(lambda task: inspect(*task), tasks))
    except MarkError as error:
        sys.exit(f"inspection: {error}")
    rows = [row for of_task, _ in results for row in of_task]
    problems = [fault for _, of_task in results for fault in of_task]
    problems += check_binary(cuobjdump)
    if not args.files:
        problems += check_table(table(rows, sorted(args.archs)), args.write)
    print("\n".join(problems) or f"{len(rows)} kernels on {len(args.archs)} architectures are within their budgets")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
