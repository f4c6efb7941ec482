"""Tensors of more than 2**31 elements: the index arithmetic of both engines, which needs no memory."""

from itertools import pairwise

import pytest

from dlfast._native import native
from tests.support.native import built_for_cuda, needs_native

UNIT = 4096
# Around what 31 and 32 bits count, and beyond; empty and small ones between.
NUMELS = [3, 2**31 - 1, 0, 2**31, 2**31 + 1, 2**32 + UNIT + 1, 5, 2**40]

pytestmark = needs_native


def units_of(numel):
    return max(1, -(-numel // UNIT))


@built_for_cuda
def test_every_block_of_a_cuda_step_finds_its_elements():
    first = 0
    for tensor, numel in enumerate(NUMELS):
        units = units_of(numel)
        for unit in {0, 1, units // 2, units - 2, units - 1}:
            if not 0 <= unit < units:
                continue
            begin = unit * UNIT
            expected = (tensor, begin, min(UNIT, numel - begin))
            assert native.module.place_of_unit(NUMELS, first + unit) == expected
        first += units


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_of_a_cpu_step_share_all_elements_out(threads):
    positions = native.module.split_work(NUMELS, threads)
    assert positions[0] == (0, 0)
    assert positions[-1] == (len(NUMELS), 0)
    assert positions == sorted(positions)
    assert all(element % UNIT == 0 and element <= NUMELS[tensor] for tensor, element in positions[:-1])
    starts = [sum(NUMELS[:tensor]) + element for tensor, element in positions]
    shares = [after - before for before, after in pairwise(starts)]
    assert sum(shares) == sum(NUMELS)
    assert max(shares) - min(shares) <= len(NUMELS) * (UNIT + 256)
