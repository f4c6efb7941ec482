"""The gates on machine code find what they are there for; the gates themselves are tools/cuda/inspection.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_build
from tools.cuda import inspection, machine_code, marks, occupancy


def kernels_in(text: str, tmp_path: Path):
    source = tmp_path / "launch.cu"
    source.write_text(text)
    return marks.kernels_of(source, tmp_path)


def test_marks_are_read_from_above_the_template_line(tmp_path):
    (kernel,) = kernels_in(
        "// What it does.\n"
        "// inspect: registers 64, holds LDG.128\n"
        "// inspect from sm_80 for Tile<__half: registers 128, dynamic 4096, loop HMMA LDSM\n"
        "template <typename Body>\n"
        "__global__ void __launch_bounds__(kThreads, 2)\n"
        "    a_kernel(const __grid_constant__ Body body) {}\n",
        tmp_path,
    )
    assert kernel.name == "a_kernel"
    plain = kernel.budget("a_kernel<Tile<float>>", 80)
    assert (plain.registers, plain.static, plain.dynamic, plain.loop) == (64, 0, 0, ())
    assert kernel.budget("a_kernel<Tile<__half>>", 75) == plain
    half = kernel.budget("a_kernel<Tile<__half>>", 80)
    assert (half.registers, half.dynamic, half.holds, half.loop) == (128, 4096, ("LDG.128",), ("HMMA", "LDSM"))


@pytest.mark.parametrize("bounds", ["(kThreads)", "(kThreads, kBlocks<T>)", "(kThreads, (kBlocks<Rule, T>))"])
def test_names_are_found_behind_any_launch_bounds(bounds, tmp_path):
    text = f"// inspect: registers 9\n__global__ void __launch_bounds__{bounds}\n    a_kernel(const Body body) {{}}\n"
    assert [kernel.name for kernel in kernels_in(text, tmp_path)] == ["a_kernel"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__global__ void k() {}\n", "kernel k has no mark"),
        ("// inspect: registers\n__global__ void k() {}\n", "not an item of a mark: registers"),
        ("// inspect: register 64\n__global__ void k() {}\n", "not an item of a mark"),
        ("// inspect registers 64\n__global__ void k() {}\n", "not a mark"),
        ("// inspect for (: registers 64\n__global__ void k() {}\n", "no regular expression"),
        ("// inspect: registers 64\nint x;\n", "stands above no kernel"),
    ],
)
def test_marks_that_say_nothing_are_errors(text, message, tmp_path):
    with pytest.raises(marks.MarkError, match=message):
        kernels_in(text, tmp_path)


def test_an_instantiation_without_a_register_budget_is_an_error(tmp_path):
    (kernel,) = kernels_in("// inspect for float: registers 9\n__global__ void k() {}\n", tmp_path)
    with pytest.raises(marks.MarkError, match="registers of k<double> for sm_80"):
        kernel.budget("k<double>", 80)


def function(*lines: str) -> machine_code.Function:
    text = "".join(f"        /*{16 * n:04x}*/    {line} ;  /* 0x0 */\n" for n, line in enumerate(lines))
    found = machine_code.INSTRUCTION.findall(text)
    return machine_code.Function("k", instructions=[machine_code._instruction(*i) for i in found])


def test_a_loop_is_what_a_backward_branch_repeats():
    loop = function("LDG.E.128 R4, [R2.64]", "HMMA.16816.F32 R8, R4", "LDSM.16.M88.4 R4, [R9]", "@P0 BRA 0x10", "EXIT")
    assert loop.loop_holds(("HMMA", "LDSM.4"))
    assert not loop.loop_holds(("HMMA", "LDG"))
    assert loop.holds("LDG.128")
    assert not loop.holds("LDG.64")
    assert loop.holds("STG|LDG.128")


def test_a_loop_may_be_laid_out_in_any_order():
    """Its body stands after the branch that leaves it, and its head after its body."""
    turned = function("BRA 0x40", "HMMA R8, R4", "LDSM R4, [R9]", "BRA 0x40", "@P0 BRA 0x10", "STG.E [R2], R8", "EXIT")
    assert turned.loop_holds(("HMMA", "LDSM"))
    assert not turned.loop_holds(("HMMA", "STG"))


def test_a_branch_on_an_operand_may_fall_through():
    either = function("HMMA R8, R4", "BRA.DIV UR4, 0x40", "LDSM R4, [R9]", "@P0 BRA 0x0", "EXIT")
    assert either.loop_holds(("HMMA", "LDSM"))
    always = function("HMMA R8, R4", "BRA 0x40", "LDSM R4, [R9]", "@P0 BRA 0x0", "EXIT")
    assert not always.loop_holds(("HMMA",))


def test_ptxas_leaves_loops_by_calls():
    left_by_call = function("HMMA R8, R4", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "LDSM R4, [R9]", "EXIT")
    assert left_by_call.loop_holds(("HMMA",))
    assert not left_by_call.loop_holds(("HMMA", "LDSM"))
    inner = ("HMMA R8, R4", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0")
    nested = function(*inner, "LDSM R4, [R9]", "@P1 CALL.REL.NOINC 0x60", "BRA 0x0", "EXIT")
    assert nested.loop_holds(("HMMA", "LDSM"))


def test_code_moved_to_the_end_is_no_loop():
    """It jumps back to where it was left, but nothing there leads to it again."""
    moved = function("@P0 BRA 0x40", "HMMA R8, R4", "STG.E [R2], R4", "EXIT", "LDSM R4, [R9]", "BRA 0x10", "BRA 0x60")
    assert not moved.loop_holds(("HMMA",))
    assert moved.holds("LDSM")


def test_names_are_shortened_to_what_marks_match():
    mangled = "_ZN6dlfast12_GLOBAL__N_116relu_pool_kernelINS_11ForwardMaskIfjEEEEvT_"
    assert machine_code.demangled([mangled])[mangled] == "relu_pool_kernel<ForwardMask<float, unsigned int>>"


@pytest.mark.skipif(cuda_build.find_toolkit() is None, reason="needs the CUDA headers")
def test_occupancy_is_that_of_the_programming_guide(tmp_path):
    """64 registers fill a quarter of 65536 with 256 threads; 48 KiB of shared memory go three times into 164."""
    launches = [(80, 64, 0, 0, 256), (80, 64, 0, 48 << 10, 256), (75, 32, 0, 0, 256), (120, 255, 0, 0, 128)]
    assert occupancy.blocks_per_sm(launches, cuda_build.find_toolkit(), tmp_path) == [4, 3, 4, 2]
    assert occupancy.occupancy(80, 4, 256) == 0.5


SPILLS = """
// inspect: registers 255, holds LDG.128
__global__ void __launch_bounds__(32) spills(float* p, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = p[i * 3];
  for (int i = 0; i < n; ++i) p[i] = a[i];
}
// inspect: registers 8
__global__ void greedy(float* p) {
  __shared__ float s[32];
  s[threadIdx.x] = p[threadIdx.x] * p[threadIdx.x + 7];
  __syncthreads();
  p[threadIdx.x] = s[31 - threadIdx.x] + p[threadIdx.x + 1] / p[threadIdx.x + 2];
}
"""


@pytest.mark.slow
def test_faults_of_real_kernels_are_found(tmp_path, monkeypatch):
    """Compiled and taken apart as the gate does it."""
    toolkit = cuda_build.find_toolkit()
    wheels = [folder / "bin" / "cuobjdump" for folder in cuda_build.wheel_folders()]
    if toolkit is None or not (shutil.which("cuobjdump") or any(place.exists() for place in wheels)):
        pytest.skip("needs nvcc and cuobjdump")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    source = tmp_path / "faulty" / "launch.cu"
    source.parent.mkdir()
    source.write_text(SPILLS)
    monkeypatch.setattr(inspection, "BUILD", tmp_path)
    monkeypatch.setattr(inspection, "ROOT", tmp_path)
    rows, faults = inspection.inspect(source, 80, marks.kernels_of(source, tmp_path), inspection.tool("cuobjdump"))
    assert {row.kernel for row in rows} == {"spills", "greedy"}
    text = "\n".join(faults)
    for expected in (
        "spills: 256 bytes of stack", "spills: local memory is accessed: LDL", "spills: no LDG.128",
        "registers, the budget is 8", "greedy: 128 bytes of static shared memory, the budget is 0",
        "greedy: no __launch_bounds__",
    ):  # fmt: skip
        assert expected in text


def test_the_script_says_what_is_missing(tmp_path):
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tools.cuda.inspection"]
    done = subprocess.run(command, cwd=inspection.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no nvcc: put a CUDA toolkit on PATH, or install the extra cuda-build" in done.stderr


def test_the_table_is_compared_where_architectures_are_in_both():
    committed = "| kernel | sm_75 | sm_80 |\n|---|---|---|\n| k | 64: 32 (100%) | 64: 32 (50%) |\n"
    same = "| kernel | sm_80 | sm_90 |\n|---|---|---|\n| k | 64: 32 (50%) | 64: 32 (50%) |\n"
    assert inspection.columns(committed, same) == inspection.columns(same, committed)
    other = same.replace("64: 32 (50%) | 64", "65: 28 (44%) | 64")
    assert inspection.columns(committed, other) != inspection.columns(other, committed)
    more = same + "| new | 9: 64 (100%) | 9: 64 (100%) |\n"
    assert inspection.columns(committed, more) != inspection.columns(more, committed)
    assert inspection.columns("", same) != inspection.columns(same, "")
