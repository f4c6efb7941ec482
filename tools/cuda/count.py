"""Counts what the CUDA kernels move and compute, on the emulator, and fails where it is too much.

usage: python -m tools.cuda.count [--write] [--only NAME]

Runs each case in a process of its own with the emulator's profile on, and reports per kernel the sectors it asks
for against the ideal, the distinct ones (the least traffic with memory), bank conflicts of shared memory, and the
multiply-adds of the tensor cores against the problem's. A part of the backward pass is a run of it after the forward
less one of the forward alone. --write writes benchmarks/results/cuda-counted.md; without it that file must be what was
counted.

Kernels of PyTorch are not counted: the emulator computes those on the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlfast.app.bench.traffic import Layer, compulsory, epilogue, single
from tools.cuda.machine_code import shortened

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT.parent / "shared" / "cuda-emulator" / "run"
TABLE = ROOT / "benchmarks" / "results" / "cuda-counted.md"
SECTOR = 32
ITEMS = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Case:
    """A layer run one way; the limits are multiples of the bytes its kernels must move."""

    layer: Layer
    way: str  # as DLFAST_ALGORITHM has it
    requested: float  # of the forward; on the epilogue path of the backward too
    dtype: str = "float16"
    channels_last: bool = True
    distinct: float = 1.1
    conflicts: float = 0.0  # extra wavefronts of the forward, for each access to shared memory
    backward: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        parts = ("grad_input", "grad_weight") if self.way == "single" else ("grad_z", "grad_bias")
        return ("forward", *parts) if self.backward else ("forward",)

    @property
    def name(self) -> str:
        x = self.layer
        window = f"pool {x.pool_size}" if x.pool_size else "no pool"
        return f"{x.n}x{x.c}x{x.h}x{x.h} to {x.k}, {x.kernel}x{x.kernel}, {window}, {self.dtype}, {self.way}"


def layer(n: int, c: int, k: int, h: int, kernel: int = 3, pool: int = 2) -> Layer:
    return Layer("", "", n, c, k, h, kernel, padding=kernel // 2, pool_size=pool, pool_stride=pool or 2)


CASES = [
    # The passes of the epilogue path read and write everything once; beside that, biases and the ends of rows.
    Case(layer(2, 8, 64, 16), "pytorch", 1.05),
    Case(layer(2, 8, 64, 16), "pytorch", 1.1, "float32"),
    Case(layer(2, 4, 8, 32), "pytorch", 1.05, channels_last=False),
    Case(layer(2, 4, 8, 27, pool=3), "pytorch", 1.25, "float32", channels_last=False, conflicts=0.8),
    Case(layer(2, 8, 32, 12, pool=0), "pytorch", 1.1),
    # The single kernel: 2x2 windows have the limits of the issue it was written for. First layers lay out weights and
    # patch by ordinary stores, whose conflicts the profile counts with those of the main loop.
    Case(layer(2, 1, 32, 28), "single", 2.5, conflicts=0.1),
    Case(layer(1, 3, 64, 64), "single", 2.5, conflicts=0.1),
    Case(layer(1, 3, 32, 32, kernel=5), "single", 2.5, conflicts=0.1),
    Case(layer(1, 64, 64, 56), "single", 4.0, backward=False),  # its gradients take the emulator minutes
    Case(layer(1, 64, 64, 28), "single", 4.0),
    Case(layer(1, 32, 64, 28), "single", 4.0, "bfloat16"),
    Case(layer(1, 32, 64, 28), "single", 4.0, "float32"),
    Case(layer(1, 32, 64, 27, pool=3), "single", 4.0),
    Case(layer(1, 32, 64, 28, pool=0), "single", 4.0),
]


def run_child(case: Case, part: str) -> bool:
    """In a process under the emulator: the forward, and a part of the backward. False where there is no such way."""
    import torch

    x = case.layer
    dtype = getattr(torch, case.dtype)
    format = torch.channels_last if case.channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        value = torch.randn(shape, generator=generator).to("cuda", dtype)
        # Not contiguous(): that leaves the strides of one channel as they are, which fit both formats.
        return torch.empty_like(value, memory_format=format).copy_(value) if len(shape) == 4 else value

    input, weight, bias = tensor(x.n, x.c, x.h, x.h), tensor(x.k, x.c, x.kernel, x.kernel), tensor(x.k)
    block = ((1, 1), (x.padding,) * 2, (1, 1), 1)
    size, stride = (max(x.pool_size, 1),) * 2, (x.pool_stride if x.pool_size else 1,) * 2
    pooling = ("relu", "max" if x.pool_size else None, size, stride, (0, 0), False)
    from dlfast._native import native

    assert native.module is not None, native.reason
    if case.way == "single":
        names = ("stride", "padding", "dilation", "groups", "activation", "pool", "pool_size", "pool_stride",
                 "pool_padding", "ceil_mode")  # fmt: skip
        options = dict(zip(names, (*block, *pooling), strict=True))
        report = native.module.report_block(
            input=input, weight=weight, bias=None, save_winner_mask=True, flops=1.0, bandwidth=1.0, **options
        )
        choice = getattr(report, part)
        if choice.candidates[choice.best].algorithm != "single":
            return False
    ops = torch.ops.dlfast
    output, winner_mask = ops._conv_relu_pool2d(input, weight, bias, *block, *pooling, True)
    if part != "forward":
        wanted = {
            "grad_input": [True, False, False],
            "grad_weight": [False, True, True],
            "grad_z": [True, False, False],  # expanded by our pass, the rest is PyTorch's and not counted
            "grad_bias": [False, False, True],
        }
        grad, saved = tensor(*output.shape), winner_mask if x.pool_size else output
        ops._conv_relu_pool2d_backward(grad, input, weight, saved, *block, *pooling, wanted[part])
    return True


def profile(case: Case, part: str) -> dict[str, dict[str, Any]] | None:
    """Counters by kernel of a run up to this part, or None where this build has no such way."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        environment = {
            **os.environ, "CUDA_EMULATOR_PROFILE": str(file), "DLFAST_ALGORITHM": case.way, "OMP_NUM_THREADS": "1",
            "CUDA_EMULATOR_GLOBAL_RACE": "0", "PYTHON": sys.executable,
        }  # fmt: skip
        command = [str(EMULATOR), sys.executable, "-m", "tools.cuda.count", "--child", str(CASES.index(case)), part]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        if done.returncode == NOT_HERE:
            return None
        if done.returncode != 0:
            sys.exit(f"count: {case.name} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        kernels = json.loads(file.read_text())["kernels"] if file.exists() else []  # none without a launch of ours
        return {kernel["name"]: kernel for kernel in kernels}


NOT_HERE = 77
# Matrix loads of grad_weight have no conflicts; writing its tables, and expanding odd windows, has some.
TABLES = 0.2
SUMS = ("grad_weight", "grad_bias")  # their blocks leave partial sums, which weigh much in problems as small as these


@dataclass(frozen=True)
class Count:
    """A kernel in one part of a case."""

    kernel: str
    launches: int
    requested: int  # bytes of the sectors asked for
    ideal: int  # of them, had every access used its sectors fully
    distinct: int  # bytes of the sectors touched
    shared: int  # accesses to shared memory
    conflicts: int  # and what bank conflicts add to them
    macs: int


def counters(kernel: dict[str, Any]) -> tuple[int, ...]:
    sides = (kernel["global_read"], kernel["global_write"])
    shared = (kernel["shared_read"], kernel["shared_write"])
    return (
        kernel["launches"],
        SECTOR * sum(side["sectors"] for side in sides),
        SECTOR * sum(side["ideal_sectors"] for side in sides),
        kernel["dram_lower_bound_bytes"],
        sum(side["instructions"] for side in shared),
        sum(side["extra_wavefronts"] for side in shared),
        kernel["macs"],
    )


def count(case: Case) -> dict[str, list[Count] | None]:
    """By part; None for what this build has no such way for."""
    counted: dict[str, list[Count] | None] = {}
    first = profile(case, "forward") or {}
    for part in case.parts:
        run = first if part == "forward" else profile(case, part)
        kernels = []
        for name, kernel in (run or {}).items():
            before = counters(first[name]) if part != "forward" and name in first else (0,) * 7
            own = [after - earlier for after, earlier in zip(counters(kernel), before, strict=True)]
            if any(own):
                kernels.append(Count(shortened(name), *own))
        counted[part] = kernels or None
    return counted


def must_move(case: Case, part: str) -> int:
    """Bytes of the operands of dlfast's own kernels in this part."""
    item = ITEMS[case.dtype]
    if case.way == "single" and part == "forward":
        return compulsory(case.layer, item)
    step = single(case.layer, item) if case.way == "single" else epilogue(case.layer, item)
    assert step is not None
    begins = {"forward": "bias, ReLU", "grad_z": "expand"}.get(part, part)  # the kernel's name in the formulas
    return sum(kernel.bytes for kernel in (*step.forward, *step.backward) if kernel.name.startswith(begins))


def report(case: Case, counted: dict[str, list[Count] | None]) -> tuple[list[str], list[str]]:
    """Lines of the table, and faults."""
    lines, faults = [], []
    x = case.layer
    macs = x.n * x.k * x.convolved() ** 2 * x.c * x.kernel**2 if case.way == "single" else 0
    for part, kernels in counted.items():
        where = f"{case.name}, {part}"
        if kernels is None:
            lines.append(f"| {where} | none of this way | | | | | | |")
            continue
        must = must_move(case, part)
        distinct, requested = sum(k.distinct for k in kernels) / must, sum(k.requested for k in kernels) / must
        computed, conflicts = sum(k.macs for k in kernels), sum(k.conflicts for k in kernels)
        for k in kernels:
            lines.append(
                f"| {where} | `{k.kernel}` | {k.launches} | {k.requested} | {k.requested / k.ideal:.2f} "
                f"| {k.distinct} | {k.conflicts} of {k.shared} | {k.macs} |"
            )
        ratio = f"{computed / macs:.2f}" if macs else ""
        lines.append(f"| | of the {must} bytes it must move | | {requested:.2f} | | {distinct:.2f} | | {ratio} |")
        if distinct > case.distinct and part not in SUMS:
            faults.append(f"{where}: touches {distinct:.2f} times what it must, the limit is {case.distinct}")
        if requested > case.requested and part in ("forward", "grad_z"):
            faults.append(f"{where}: asks for {requested:.2f} times what it must, the limit is {case.requested}")
        allowed = {"forward": case.conflicts, "grad_weight": TABLES}.get(part, 0.0)
        if conflicts > allowed * sum(k.shared for k in kernels):
            faults.append(f"{where}: {conflicts} extra wavefronts from bank conflicts")
        if computed < macs:
            faults.append(f"{where}: {computed} multiply-adds on tensor cores, the problem has {macs}")
    return lines, faults


HEAD = """# What the CUDA kernels move, counted

Written by `python -m tools.cuda.count --write`; `.ci/run` fails where it is not what is counted. **Counted** while the
PTX of the kernels ran on the emulator, not measured on a GPU. Requested bytes are 32 for every sector that an access
of a warp touches, of the least that its lanes' bytes fit in (less than 1 where lanes share them); what exceeds the
distinct bytes is mostly for caches to serve. Distinct bytes are the least that memory must move. Bank conflicts are
extra wavefronts, of all accesses to shared memory but those of `cp.async`. What PyTorch's own kernels move is not in
here.

| problem, part | kernel | launches | requested bytes | of ideal | distinct bytes | bank conflicts | tensor-core MACs |
|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cuda-counted.md")
    parser.add_argument("--only", metavar="TEXT", help="cases with this in their name; the table is not compared")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return 0 if run_child(CASES[int(args.child[0])], args.child[1]) else NOT_HERE
    if not EMULATOR.exists():
        print(f"count: no CUDA emulator at {EMULATOR}: nothing is counted")
        return 0
    lines, faults = [], []
    chosen = [case for case in CASES if not args.only or args.only in case.name]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for case, counted in zip(chosen, pool.map(count, chosen), strict=True):
            more_lines, more_faults = report(case, counted)
            print("\n".join(more_lines), flush=True)
            lines += more_lines
            faults += more_faults
    text = HEAD + "\n".join(lines) + "\n"
    if args.write:
        TABLE.write_text(text)
        print(f"written: {TABLE.relative_to(ROOT)}")
    elif not args.only and (TABLE.read_text() if TABLE.exists() else "") != text:
        faults.append(
            f"{TABLE.relative_to(ROOT)} is not what was counted: write it with python -m tools.cuda.count --write"
        )
    print("\n".join(faults) or "all counts are within their limits")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
