"""The table of folder edges holds, and catches what breaks it: every kind of violation is planted once."""

from __future__ import annotations

import pytest

from tools import seams

SOURCES = seams.sources()
TORCH_HEADER = "#include <ATen/Functions.h>\n"


def includes(path: str) -> str:
    return f'#include "{path}"\n'


def without_check(text: str, number: int) -> str:
    """`text` without the number-th call of check_launch."""
    parts = text.split("check_launch(")
    return "check_launch(".join(parts[: number + 1]) + "static_cast<void>(" + "check_launch(".join(parts[number + 1 :])


def test_the_table_holds():
    assert [line for path, text in SOURCES.items() for line in seams.violations(path, text)] == []


def test_every_folder_has_its_edges_and_none_runs_back():
    assert {seams.folder_of(path) for path in SOURCES} == set(seams.EDGES)
    below: set[str] = set()
    while len(below) < len(seams.EDGES):
        ready = {folder for folder, edges in seams.EDGES.items() if edges <= below} - below
        assert ready, "a circle"
        below |= ready


@pytest.mark.parametrize(
    ("path", "planted", "said"),
    [
        ("pool/cuda/kernel_relu_pool.cuh", TORCH_HEADER, "ATen/Functions.h: not for this kind"),
        ("conv/cpu/winograd.h", TORCH_HEADER, "ATen/Functions.h: not for this kind"),
        ("conv/params.h", "#include <c10/util/Exception.h>\n", "c10/util/Exception.h: not for this kind"),
        ("conv/op.cpp", includes("conv/cpu/winograd.h"), "may not see one of the kind 'cpu body'"),
        ("conv/heuristics_cuda.cpp", includes("conv/cuda/kernel_channels.cuh"), "may not see one of the kind 'kernel'"),
        ("conv/autograd.cpp", includes("conv/cuda/launch_conv.cuh"), "may not see one of the kind 'launch'"),
        ("core/checks.h", includes("conv/params.h"), "core may not see conv"),
        ("core/memo.h", includes("pool/params.h"), "core may not see pool"),
        ("pool/op.cpp", includes("conv/options.h"), "pool may not see conv"),
        ("pool/cpu/window.h", includes("conv/cpu/kernels.h"), "pool may not see conv"),
        ("norm/op.cpp", includes("conv/options.h"), "norm may not see conv"),
        ("conv/autograd.cpp", includes("chain/conv_norm.h"), "conv may not see chain"),
        ("optim/step.h", includes("conv/params.h"), "optim may not see conv"),
        ("conv/op_cpu.cpp", includes("simd/kernels.h"), "conv may not see simd"),
        ("conv/cuda/kernel_fma.cuh", includes("conv/cuda/launch_conv.cuh"), "may not see one of the kind 'launch'"),
        ("conv/cpu/forward.h", includes("pool/op.h"), "may not see one of the kind 'operator'"),
        ("library.cpp", includes("simd/table.inc"), "may not see one of the kind 'gather'"),
        ("conv/op_cpu.cpp", includes("simd/table.inc"), "conv may not see simd"),
        ("conv/op.cpp", "kernel<<<1, 1>>>(p);\ncheck_launch(name);\n", "launches belong in core/launch.cuh"),
        ("pool/cuda/launch_grad_bias.cu", "C10_CUDA_KERNEL_LAUNCH_CHECK();\n", "check_launch names the kernel"),
        ("conv/strange.txt.h", "", "knows no such kind of file"),
        ("other/op.cpp", "", "knows no such kind of file"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_caught(path, planted, said):
    found = seams.violations(path, planted + SOURCES.get(path, ""))
    assert len(found) == 1
    assert path in found[0]
    assert said in found[0]


LAUNCHES = [(path, number) for path, text in SOURCES.items() for number in range(text.count("<<<"))]


@pytest.mark.parametrize(("path", "number"), LAUNCHES, ids=str)
def test_every_launch_has_a_check_of_its_own(path, number):
    """Also in a file whose other launches are checked."""
    found = seams.violations(path, without_check(SOURCES[path], number))
    assert len(found) == 1
    assert "a launch without check_launch after it" in found[0]


def test_there_are_launches():
    assert len(LAUNCHES) > 5
