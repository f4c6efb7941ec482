"""Counts on the emulator agree with the formulas of traffic.py, and the gate on them, tools/cuda/count.py, can fail."""

from __future__ import annotations

import dataclasses

import pytest

from dlfast._native import native
from dlfast.app.bench import traffic
from tools.cuda import count as script

here = pytest.mark.skipif(
    not script.EMULATOR.exists() or native.module is None or not native.build.get("cuda"),
    reason="needs the emulator and a build with CUDA",
)
SINGLE = next(case for case in script.CASES if case.way == "single")


@here
@pytest.mark.slow
@pytest.mark.parametrize("way", ["pytorch", "single"])
def test_distinct_bytes_are_those_of_the_formulas(way):
    """To the sector of each of the five tensors."""
    case = next(case for case in script.CASES if case.way == way and case.layer.c > 1)
    counted = script.count(case)
    assert counted["forward"] is not None
    for part, kernels in counted.items():
        if kernels is not None and part not in script.SUMS:
            distinct = sum(kernel.distinct for kernel in kernels)
            assert abs(distinct - script.must_move(case, part)) < 5 * script.SECTOR, (part, kernels)


def counted(case, **changes):
    """A forward without fault, but for the changes."""
    x = case.layer
    must = script.must_move(case, "forward")
    macs = x.n * x.k * x.convolved() ** 2 * x.c * x.kernel**2
    fine = script.Count("kernel", 1, requested=must, ideal=must, distinct=must, shared=100, conflicts=0, macs=macs)
    return {"forward": [dataclasses.replace(fine, **changes)]}


def test_counts_within_the_limits_pass():
    lines, faults = script.report(SINGLE, counted(SINGLE))
    assert faults == []
    assert f"of the {traffic.compulsory(SINGLE.layer, 2)} bytes it must move | | 1.00 | | 1.00 | | 1.00 |" in lines[-1]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"distinct": 10**7}, "times what it must, the limit is 1.1"),
        ({"requested": 10**7}, "times what it must, the limit is 2.5"),
        ({"conflicts": 11}, "11 extra wavefronts from bank conflicts"),
        ({"macs": 7}, "7 multiply-adds on tensor cores, the problem has"),
    ],
)
def test_each_limit_can_be_exceeded(changes, fault):
    _, faults = script.report(SINGLE, counted(SINGLE, **changes))
    assert len(faults) == 1
    assert fault in faults[0]


def test_parts_are_those_of_the_formulas():
    """Nothing that dlfast runs is left out of what its kernels must move, but the bias of the single kernel."""
    for case in script.CASES:
        item = script.ITEMS[case.dtype]
        single = case.way == "single"
        step = traffic.single(case.layer, item) if single else traffic.epilogue(case.layer, item)
        theirs = (*step.forward, *step.backward) if case.backward else step.forward
        moved = sum(script.must_move(case, part) for part in case.parts)
        if single:
            left_out = traffic.Sizes.of(case.layer, item).b
        else:
            left_out = sum(kernel.bytes for kernel in theirs if kernel.name.startswith("convolution"))
        assert moved + left_out == sum(kernel.bytes for kernel in theirs)
