"""The fused block against the reference, over the whole grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlfast
from dlfast import reference
from tests.functional import cases
from tests.functional.cases import Case
from tests.support.native import needs_native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["direct", "masked", "winograd2", "pytorch"])
def plan(request, monkeypatch):
    """Every way of computing a block that is exact on whole numbers, whichever the planner would choose."""
    monkeypatch.setenv("DLFAST_ALGORITHM", request.param)
    return request.param


def layout_of(tensor: torch.Tensor) -> list[int]:
    """The strides that mean something: of dimensions with more than one element, if there is any element."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in pairs if size > 1] if tensor.numel() else []


def assert_same_as_reference(case: Case, tensors: list[torch.Tensor]) -> None:
    """Equal bits forward, by the way that is forced; backward equal where sums of whole numbers stay exact."""
    cases.assert_forced(case, tensors)
    output, grads = cases.run_as_chosen(dlfast.conv_relu_pool2d, tensors, case.options)
    expected, expected_grads = cases.run(reference.conv_relu_pool2d, tensors, case.options)
    dtype = output.dtype
    averaged = case.pool.get("pool") == "avg"
    # An average divides, and gradients in 16 bits are rounded where the reference rounds elsewhere.
    assert output.dtype == expected.dtype
    assert layout_of(output) == layout_of(expected)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output, expected, rtol=2 * eps if averaged else 0, atol=2 * eps if averaged else 0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        exact = not averaged and dtype in (torch.float32, torch.float64)
        # Where a sum cancels, what is left is the rounding of its terms, which are about 1.
        scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0 if exact else 8 * eps * scale)


@pytest.mark.parametrize("case", cases.GRID, ids=str)
def test_grid_float32(case, plan):
    assert_same_as_reference(case, cases.integers(case, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", cases.GRID[::5], ids=str)
def test_grid_other_dtypes(case, dtype, plan):
    assert_same_as_reference(case, cases.integers(case, dtype))


@pytest.fixture
def threads():
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("case", cases.DEPTHWISE, ids=str)
def test_depthwise_layouts(case, layout, monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "direct")
    input, weight, bias = cases.integers(case, torch.float32)
    assert_same_as_reference(case, [cases.in_layout(input, layout), weight, bias])
    assert_same_as_reference(case, [cases.in_layout(input, layout), weight.transpose(2, 3).clone().transpose(2, 3)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases.DEPTHWISE, ids=str)
def test_depthwise_in_16_bits(case, dtype, monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "direct")
    for layout in ("contiguous", "channels_last"):
        input, *others = cases.integers(case, dtype)
        assert_same_as_reference(case, [cases.in_layout(input, layout), *others])


@needs_native  # of PyTorch's kernels it is not true
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.DEPTHWISE, ids=str)
def test_depthwise_has_the_same_bits_for_any_number_of_threads(case, layout, threads, monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "direct")
    input, *others = cases.normals(replace(case, n=5), torch.float32)
    tensors = [cases.in_layout(input, layout), *others]
    cases.assert_forced(case, tensors)
    results = []
    for count in (1, 2, 7):
        threads(count)
        output, grads = cases.run(dlfast.conv_relu_pool2d, tensors, case.options)
        results.append([output, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    exact, exact_grads = cases.run(reference.conv_relu_pool2d, [t.double() for t in tensors], case.options)
    bound = cases.forward_bound(case, tensors, torch.float32)
    assert ((results[0][0].double() - exact).abs() <= bound).all()
    for grad, wanted in zip(results[0][1:], exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", [0, 1, 2], ids=["input", "weight", "bias"])
def test_depthwise_keeps_what_is_not_finite_where_it_belongs(where, value, activation, monkeypatch):
    """No padding: what a zero of the padding makes of an infinity differs between PyTorch's own algorithms."""
    monkeypatch.setenv("DLFAST_ALGORITHM", "direct")
    case = Case(c=20, k=20, conv={"groups": 20}, pool={"pool": None, "activation": activation})
    tensors = cases.normals(case, torch.float32)
    tensors[where].view(-1)[13] = value
    tensors[0] = cases.in_layout(tensors[0], "channels_last")
    cases.assert_forced(case, tensors)
    output, grads = cases.run(dlfast.conv_relu_pool2d, tensors, case.options)
    expected, expected_grads = cases.run(reference.conv_relu_pool2d, tensors, case.options)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_native
def test_depthwise_is_what_the_plan_says(monkeypatch):
    """The tests above would pass with any way; and PyTorch keeps what is not measured."""
    layer = dlfast.nn.ConvReLUPool2d(64, 64, 5, padding=2, groups=64, activation=None, pool=None)
    input = torch.empty(4, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    pooled = dlfast.nn.ConvReLUPool2d(64, 64, 5, padding=2, groups=64)
    monkeypatch.setenv("DLFAST_ALGORITHM", "direct")
    plan = dlfast.explain(layer, input)
    assert (plan.forward, plan.grad_input, plan.grad_weight) == ("depthwise",) * 3
    assert dlfast.explain(pooled, input).forward == "direct"
    assert dlfast.explain(layer.double(), input.double()).forward == "pytorch"


WIDE = Case(c=24, k=40, h=15, w=18, conv={"padding": 1})
# Tiles of several images at once, a band in parts, and output channels in rounds: by the sizes of caches.
SEVERAL_IMAGES = Case(n=7, c=96, k=80, h=9, w=6, conv={"padding": 1})
PARTS = Case(n=1, c=24, k=40, h=11, w=420, conv={"padding": 1})
ROUNDS = Case(n=2, c=272, k=270, h=9, w=6, conv={"padding": 1})
WINOGRAD = [
    case
    for case in [
        *cases.GRID,
        *(replace(WIDE, pool=pool) for pool in cases.POOLS),
        *(replace(case, pool=pool) for case in (SEVERAL_IMAGES, PARTS, ROUNDS) for pool in ({}, {"pool": None})),
    ]
    if cases.winograd_accepts(case)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", WINOGRAD, ids=str)
def test_winograd_in_tiles_of_four(case, dtype, monkeypatch):
    """Its fractions round: within 16 times the bound of a direct sum, and gradients where winners are clear."""
    monkeypatch.setenv("DLFAST_ALGORITHM", "winograd4")
    tensors = cases.normals(case, dtype)
    cases.assert_forced(case, tensors)
    output, grads = cases.run(dlfast.conv_relu_pool2d, tensors, case.options)
    exact, exact_grads = cases.run(reference.conv_relu_pool2d, [t.double() for t in tensors], case.options)
    assert layout_of(output) == layout_of(reference.conv_relu_pool2d(*tensors, **case.options))
    assert ((output.double() - exact).abs() <= 16 * cases.forward_bound(case, tensors, dtype)).all()
    if dtype != torch.float32:
        return  # the reference rounds before it pools, so that winners differ
    for grad, wanted in zip(grads, exact_grads, strict=True):
        scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("plan", ["direct", "winograd2", "winograd4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("where", ["input", "weight"])
def test_wide_layers_take_the_dense_way_for_what_is_not_finite(where, value, plan, monkeypatch):
    """Winograd would spread an infinity over its tile, and the sparse sums would skip 0 * inf."""
    case = replace(WIDE, conv={}, pool={"pool_size": 2})  # no padding, see test_nan_and_infinity
    tensors = cases.normals(case, torch.float32)
    tensors[0 if where == "input" else 1].view(-1)[1234] = value
    monkeypatch.setenv("DLFAST_ALGORITHM", "pytorch")
    expected, expected_grads = cases.run(dlfast.conv_relu_pool2d, tensors, case.options)
    monkeypatch.setenv("DLFAST_ALGORITHM", plan)
    output, grads = cases.run(dlfast.conv_relu_pool2d, tensors, case.options)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(output.isfinite(), expected.isfinite())
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad.isnan(), wanted.isnan())


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("case", cases.SAMPLE, ids=str)
def test_layouts(case, layout, plan):
    input, weight, bias = cases.integers(case, torch.float32)
    assert_same_as_reference(case, [cases.in_layout(input, layout), weight, bias])
    assert_same_as_reference(case, [input, cases.in_layout(weight, layout), bias])


@pytest.mark.parametrize("case", cases.SAMPLE, ids=str)
def test_without_bias(case, plan):
    assert_same_as_reference(case, cases.integers(case, torch.float32, bias=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.SAMPLE, ids=str)
def test_accuracy_against_float64(case, dtype, plan):
    tensors = cases.normals(case, dtype)
    cases.assert_forced(case, tensors)
    output = dlfast.conv_relu_pool2d(*tensors, **case.options)
    expected = reference.conv_relu_pool2d(*(t.double() for t in tensors), **case.options)
    assert ((output.double() - expected).abs() <= cases.forward_bound(case, tensors, dtype)).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data, plan):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel = (draw(1, 4), draw(1, 4))
    groups = draw(1, 2)
    conv = {
        "stride": (draw(1, 3), draw(1, 3)),
        "padding": (draw(0, 3), draw(0, 3)),
        "dilation": (draw(1, 2), draw(1, 2)),
        "groups": groups,
    }
    window = (draw(1, 4), draw(1, 4))
    pool = {
        "pool": data.draw(st.sampled_from(["max", "avg", None])),
        "activation": data.draw(st.sampled_from(["relu", None])),
        "pool_size": window,
        "pool_stride": (draw(1, 4), draw(1, 4)),
        "pool_padding": (draw(0, window[0] // 2), draw(0, window[1] // 2)),
        "ceil_mode": data.draw(st.booleans()),
    }
    case = Case(draw(0, 3), groups * draw(1, 5), draw(1, 20), draw(1, 20), groups * draw(1, 20), kernel, conv, pool)
    tensors = cases.integers(case, torch.float32)
    tensors[0] = cases.in_layout(tensors[0], data.draw(st.sampled_from(cases.LAYOUTS)))
    try:
        reference.conv_relu_pool2d(*tensors, **case.options)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            dlfast.conv_relu_pool2d(*tensors, **case.options)
        return
    assert_same_as_reference(case, tensors)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_named_padding(padding, kernel, plan):
    case = Case(kernel=kernel, conv={"padding": padding})
    assert_same_as_reference(case, cases.integers(case, torch.float32))


def test_unbatched(plan):
    case = Case(n=1, conv={"padding": 1})
    input, weight, bias = cases.integers(case, torch.float32)
    assert_same_as_reference(case, [input[0], weight, bias])


SPECIAL = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("where", ["input", "bias"])
@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("pool", cases.POOLS[:9], ids=str)
def test_nan_and_infinity(pool, value, where, layout, plan):
    """No padding: what a zero of the padding makes of an infinity differs between PyTorch's own algorithms."""
    case = Case(c=2, k=16, h=12, w=10, pool=pool)
    input, weight, bias = cases.integers(case, torch.float32)
    weight = weight + 2  # no zeros, so that every path meets the same products
    if where == "input":
        input[0, 0, 3, 4] = input[1, 1, 7, 7] = value
    else:
        bias[3] = value
    tensors = [cases.in_layout(input, layout), weight, bias]
    cases.assert_forced(case, tensors)
    output, grads = cases.run(dlfast.conv_relu_pool2d, tensors, case.options)
    expected, expected_grads = cases.run(reference.conv_relu_pool2d, tensors, case.options)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=0, equal_nan=True)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_ties_go_to_the_first_position(plan):
    """Constant input: every position of a window ties, and the gradient belongs to its first."""
    input = torch.ones(1, 1, 6, 6, requires_grad=True)
    weight = torch.ones(1, 1, 1, 1)
    dlfast.conv_relu_pool2d(input, weight, pool_size=3, pool_stride=3).sum().backward()
    expected = torch.zeros(6, 6)
    expected[::3, ::3] = 1
    assert torch.equal(input.grad[0, 0], expected)


def test_no_gradient_where_relu_is_exactly_zero(plan):
    input = torch.zeros(1, 1, 4, 4, requires_grad=True)
    weight = torch.ones(1, 1, 1, 1, requires_grad=True)
    dlfast.conv_relu_pool2d(input, weight).sum().backward()
    assert input.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("case", cases.SAMPLE, ids=str)
def test_gradcheck(case):
    small = Case(1, case.c, 6, 7, case.k if case.k < 32 else 3, case.kernel, case.conv, case.pool)
    tensors = [t.requires_grad_() for t in cases.normals(small, torch.float64)]

    def block(*tensors: torch.Tensor) -> torch.Tensor:
        return dlfast.conv_relu_pool2d(*tensors, **small.options)

    assert torch.autograd.gradcheck(block, tensors)
    assert torch.autograd.gradgradcheck(block, tensors)


@needs_native
@pytest.mark.parametrize("plan", ["direct", "masked", "winograd2", "winograd4", "pytorch"])
@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_same_bits_from_run_to_run(threads, channels, plan, monkeypatch):
    """For a given number of threads; and the gradients are right for the winners that forward has chosen."""
    monkeypatch.setenv("DLFAST_ALGORITHM", plan)
    case = Case(n=7, c=channels, k=40, h=32, w=30, conv={"padding": 1})
    input, weight, bias = cases.normals(case, torch.float32)
    cases.assert_forced(case, [input, weight, bias])
    geometry = [(1, 1), (1, 1), (1, 1), 1, "relu", "max", (2, 2), (2, 2), (0, 0), False]
    grad = torch.randn(7, 40, 16, 15, generator=torch.Generator().manual_seed(1))

    def both() -> list[torch.Tensor]:
        output, winner_mask = torch.ops.dlfast._conv_relu_pool2d(input, weight, bias, *geometry, True)
        grads = torch.ops.dlfast._conv_relu_pool2d_backward(grad, input, weight, winner_mask, *geometry, [True] * 3)
        return [output, winner_mask, *grads]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = both(), both()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = [t.double() for t in (input, weight, bias)]
    output = reference.conv_relu_pool2d(*exact, **case.options)
    bound = cases.forward_bound(case, [input, weight, bias], torch.float32)
    assert ((first[0].double() - output).abs() <= (16 if plan == "winograd4" else 1) * bound).all()
    wanted = torch.ops.dlfast._conv_relu_pool2d_backward(grad.double(), *exact[:2], first[1], *geometry, [True] * 3)
    for ours, dense in zip(first[2:], wanted, strict=True):
        torch.testing.assert_close(ours.double(), dense, rtol=0, atol=1e-5 * dense.abs().max().item())


@needs_native
@pytest.mark.parametrize("plan", ["direct", "masked"])
@pytest.mark.parametrize("pool", [{}, {"pool_size": (1, 4)}, {"pool_size": 3}, {"pool": None}], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2), (7, 7)], ids=str)
def test_layers_of_few_channels(kernel, channels, pool, plan, monkeypatch):
    """Their gradients come from registers of taps or of output channels; more of these than one list holds."""
    monkeypatch.setenv("DLFAST_ALGORITHM", plan)
    case = Case(n=2, c=channels, k=150, h=19, w=40, kernel=kernel, conv={"stride": (1, 2)}, pool=pool)
    assert_same_as_reference(case, cases.integers(case, torch.float32))


@needs_native
@pytest.mark.parametrize("plan", ["direct", "masked"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(("size", "at"), [(12, 50), (7, 40), (7, 48)], ids=["covered", "edge", "outside"])
def test_few_channels_meet_what_is_not_finite(size, at, value, plan, monkeypatch):
    """0 * inf is NaN as in the dense way, also where no window covers a position and its gradient is 0."""
    monkeypatch.setenv("DLFAST_ALGORITHM", "pytorch")
    case = Case(n=2, c=1, k=9, h=size, w=size)
    tensors = cases.normals(case, torch.float32)
    tensors[0].view(-1)[at] = value
    expected = cases.run(dlfast.conv_relu_pool2d, tensors, case.options)[1]
    monkeypatch.setenv("DLFAST_ALGORITHM", plan)
    for grad, wanted in zip(cases.run(dlfast.conv_relu_pool2d, tensors, case.options)[1], expected, strict=True):
        assert torch.equal(grad.isnan(), wanted.isnan())
