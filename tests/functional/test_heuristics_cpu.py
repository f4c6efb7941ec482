"""The heuristics on the CPU: what it chooses on each kind of CPU, and what it is made to do."""

from __future__ import annotations

import pytest
import torch

import dlfast
from dlfast import info
from dlfast._native import native
from tests.support.cpu_kinds import KINDS, plan_for
from tests.support.native import needs_native
from tests.support.program import python

pytestmark = needs_native


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    plan_for(request.param, monkeypatch)
    return request.param


def choice_of(dtype=torch.float32, kernel=3, shape=(8, 64, 32, 32), out=64, layout=torch.contiguous_format, **options):
    block = dlfast.nn.ConvReLUPool2d(shape[1], out, kernel, padding=kernel // 2, dtype=dtype, **options)
    input = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    return dlfast.explain(block, input.requires_grad_())


def algorithms(choice) -> tuple[str, str, str]:
    return choice.forward, choice.grad_input, choice.grad_weight


def test_wide_3x3_blocks_take_winograd(kind):
    choice = choice_of()
    assert algorithms(choice) == ("winograd4", "sparse", "sparse")
    assert choice.predicted_gain > 1.2
    assert choice.floor > 0
    for part in choice.parts:
        assert part.chosen.seconds == min(c.seconds for c in part.candidates)
        assert part.candidates[0].algorithm == "pytorch"


@pytest.mark.parametrize(
    ("forced", "forward"),
    [("direct", "direct"), ("masked", "direct"), ("winograd2", "winograd2"), ("pytorch", "pytorch")],
)
def test_a_forced_plan_is_the_plan(monkeypatch, forced, forward, kind):
    monkeypatch.setenv("DLFAST_ALGORITHM", forced)
    assert choice_of().forward == forward


# Where a vector holds two products of 16 bits for one of float32, Winograd's method still needs fewer: on Zen 4 it
# is 1.2 to 1.5 times as fast. Tiles of AMX make eight, which nothing of ours comes near.
FORWARD_IN_16_BITS = {
    torch.bfloat16: {"zen2": "winograd4", "zen4": "winograd4", "skylake-x": "winograd4", "sapphire-rapids": "pytorch"},
    torch.float16: dict.fromkeys(KINDS, "winograd4"),
}


@pytest.mark.parametrize("pool", ["max", None])
@pytest.mark.parametrize("dtype", FORWARD_IN_16_BITS, ids=str)
def test_wide_3x3_blocks_in_16_bits_go_by_the_products_of_the_cpu(dtype, pool, kind):
    expected = FORWARD_IN_16_BITS[dtype].get(kind, "winograd4")
    assert choice_of(dtype, pool=pool).forward == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_direct_sum_in_16_bits_is_left_to_pytorch_where_the_cpu_has_instructions_for_it(dtype, kind):
    """Ours widens the numbers first, which wins only where PyTorch's convolution has nothing better."""
    native_products = kind == "sapphire-rapids" or (kind == "zen4" and dtype == torch.bfloat16)
    assert choice_of(dtype, kernel=5).forward == ("pytorch" if native_products else "direct")


def test_dense_gradients_in_16_bits_are_left_to_pytorch_where_they_would_be_laid_out_anew(kind):
    """Measured on Zen 4: 1.3 to 5 times as fast as ours from contiguous gradients."""
    contiguous, last = (
        choice_of(torch.bfloat16, pool=None),
        choice_of(torch.bfloat16, pool=None, layout=torch.channels_last),
    )
    native_products = kind in ("zen4", "sapphire-rapids")
    assert algorithms(contiguous)[1:] == ("pytorch" if native_products else "winograd4",) * 2
    assert last.grad_input == ("pytorch" if kind == "sapphire-rapids" else "winograd4")
    # Of a pooled gradient a quarter of the products is left.
    assert choice_of(torch.bfloat16).grad_weight == ("pytorch" if kind == "sapphire-rapids" else "sparse")


@pytest.mark.parametrize(("channels", "groups", "size", "way"), [(128, 32, 56, "pytorch"), (64, 2, 56, "winograd4")])
def test_winograd_in_groups_needs_channels_and_tiles(channels, groups, size, way, monkeypatch):
    """Convolutions alone, as a normalisation follows them: the groups of ResNeXt are too small for transforms."""
    plan_for("zen2", monkeypatch)
    block = {"kernel": 3, "out": channels, "groups": groups, "activation": None, "pool": None}
    assert algorithms(choice_of(shape=(4, channels, size, size), **block)) == (way,) * 3


@pytest.mark.parametrize(
    ("channels", "kernel", "way"), [(1, 3, "masked"), (3, 7, "rows"), (32, 3, "sparse")], ids=["tiny", "stem", "wide"]
)
def test_grad_weight_goes_by_the_number_of_products(channels, kernel, way, monkeypatch):
    plan_for("zen2", monkeypatch)
    assert choice_of(kernel=kernel, shape=(8, channels, 64, 64)).grad_weight == way


def kind_of_this_machine() -> str | None:
    """The kind that has this machine's level and products of 16 bits, if one has."""
    has = torch.cpu.get_capabilities()
    products = [name for name in ("amx_bf16", "avx512_bf16", "amx_fp16", "avx512_fp16") if has.get(name, False)]
    kinds = {
        "default ": "aarch64",
        "avx2 ": "zen2",
        "avx512 ": "skylake-x",
        "avx512 avx512_bf16": "zen4",
        "avx512 amx_bf16 avx512_bf16 avx512_fp16": "sapphire-rapids",
    }
    return kinds.get(f"{native.module.simd_level()} {' '.join(products)}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_this_machine_is_planned_for_as_its_kind(dtype, monkeypatch):
    kind = kind_of_this_machine()
    if kind is None:
        pytest.skip("no kind of the table is like this machine")

    def table() -> list[tuple[str, str, float, bool]]:
        plans = [
            choice_of(dtype),
            choice_of(dtype, kernel=5),
            choice_of(dtype, pool=None),
            choice_of(dtype, shape=(1, 3, 9, 9)),
        ]
        parts = [part for choice in plans for part in choice.parts]
        return [(part.name, c.algorithm, c.seconds, c is part.chosen) for part in parts for c in part.candidates]

    plan_for(kind, monkeypatch)
    named = table()
    monkeypatch.delenv("DLFAST_CPU_KIND")
    assert table() == named


def test_the_kind_changes_the_plan_and_not_the_kernels(monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "winograd4")
    input, weight = torch.randn(2, 16, 12, 12), torch.randn(24, 16, 3, 3)
    expected = dlfast.conv_relu_pool2d(input, weight, padding=1)
    for kind in KINDS:
        monkeypatch.setenv("DLFAST_CPU_KIND", kind)
        assert native.module.assumed_cpu() == kind
        assert torch.equal(dlfast.conv_relu_pool2d(input, weight, padding=1), expected)
    assert info.facts()["planned for"] == f"{kind}, by DLFAST_CPU_KIND"


def test_an_unknown_kind_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("DLFAST_CPU_KIND", "zen5")
    accepted = "DLFAST_CPU_KIND must be zen2, zen4, skylake-x, sapphire-rapids or aarch64, got zen5"
    with pytest.raises(ValueError, match=accepted):
        dlfast.conv_relu_pool2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))


@pytest.mark.parametrize(("kind", "forward"), [("aarch64", "winograd4"), ("zen2", "pytorch")])
def test_a_lowered_level_is_slower_than_that_of_the_kind(kind, forward, monkeypatch):
    """The default level is all there is on one of them and a quarter of PyTorch's on the other."""
    monkeypatch.delenv("DLFAST_ALGORITHM", raising=False)
    monkeypatch.setenv("DLFAST_CPU_KIND", kind)
    monkeypatch.setenv("DLFAST_CPU_CAPABILITY", "default")
    code = (
        "import torch, dlfast; block = dlfast.nn.ConvReLUPool2d(64, 64, 3, padding=1);"
        "print(dlfast.explain(block, torch.zeros(8, 64, 32, 32)).forward)"
    )
    done = python("-c", code)
    assert done.stdout.strip() == forward, done.stderr
