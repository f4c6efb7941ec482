"""Batch normalisation, ReLU and pooling as one operator, against the reference; the layers built on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dlfast
from dlfast import reference
from dlfast.nn import batch_norm_relu_pool2d
from tests.functional import cases
from tests.support.autograd import saved_bytes
from tests.support.native import needs_native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(2, 3, 9, 11), (4, 17, 8, 8), (3, 33, 7, 6), (1, 8, 40, 5), (2, 1, 5, 67)]
POOLS = [
    *(pool for pool in cases.POOLS if not (pool.get("pool") == "avg" and "ceil_mode" in pool)),
    {"pool": "avg", "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    {"pool_size": (17, 16), "pool_stride": 3, "pool_padding": (8, 8)},
]


def problem(shape, dtype, parameter_dtype, layout="contiguous", seed=0, affine=True):
    """Input, weight (of either sign) and bias, running mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    input = (draw(*shape) * 2 + 0.5).to(dtype)
    channels = shape[1]
    vectors = [draw(channels).to(parameter_dtype) for _ in range(2)] if affine else [None, None]
    statistics = [draw(channels).to(parameter_dtype), draw(channels).square().to(parameter_dtype) + 0.2]
    return cases.in_layout(input, layout), vectors, statistics


def run(function, input, vectors, statistics, **options):
    """Output, gradients of what there is, and the statistics afterwards."""
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (input, *vectors)
        if t is not None
    ]
    if vectors[0] is None:
        leaves += [None, None]
    mine = [s.clone() for s in statistics]
    output = function(leaves[0], *mine, *leaves[1:], **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad.to(output.dtype))
    return output.detach(), [leaf.grad for leaf in leaves if leaf is not None], mine


def assert_close(actual, expected, dtype):
    """To the rounding of `dtype`, relative to the largest value there is: sums cancel."""
    eps = torch.finfo(dtype).eps
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=64 * eps * max(scale, 1.0))


def assert_same_as_reference(input, vectors, statistics, dtype, **options):
    """Against float64, where no ReLU and no maximum is decided by rounding."""
    output, grads, after = run(batch_norm_relu_pool2d, input, vectors, statistics, **options)
    wide = [v if v is None else v.double() for v in vectors]
    expected, wanted, moved = run(
        reference.batch_norm_relu_pool2d, input.double(), wide, [s.double() for s in statistics], **options
    )
    assert output.dtype == dtype
    assert_close(output, expected, dtype)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, dtype)
    for have, want in zip(after, moved, strict=True):
        assert_close(have, want, have.dtype)


@pytest.mark.parametrize("training", [True, False], ids=["batch", "fixed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_float32_and_float64(pool, shape, layout, training):
    try:
        reference.relu_pool2d(torch.zeros(shape), **pool)
    except RuntimeError:
        pytest.skip("the window does not fit")
    for dtype in (torch.float32, torch.float64):
        problem_ = problem(shape, dtype, dtype, layout)
        assert_same_as_reference(*problem_, dtype, training=training, **pool)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("pool", POOLS[:9], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_16_bit_forward(dtype, pool, layout):
    """Only forward: which of two equal 16-bit values wins a window depends on where they were rounded."""
    input, vectors, statistics = problem((4, 17, 8, 10), dtype, torch.float32, layout)
    mean, var = (s.clone() for s in statistics)
    output = batch_norm_relu_pool2d(input, mean, var, *vectors, training=True, **pool)
    expected = reference.batch_norm_relu_pool2d(
        input.double(), *(s.double() for s in statistics), *(v.double() for v in vectors), training=True, **pool
    )
    assert output.dtype == dtype
    assert_close(output, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("pool", [{"pool": None}, {"pool": "avg"}, {"activation": None, "pool": None}, {}], ids=str)
def test_16_bit_backward(pool, dtype):
    input, vectors, statistics = problem((4, 17, 8, 10), dtype, torch.float32)
    output, grads, _ = run(batch_norm_relu_pool2d, input, vectors, statistics, training=True, **pool)
    _, wanted, _ = run(
        reference.batch_norm_relu_pool2d, input.double(), [v.double() for v in vectors],
        [s.double() for s in statistics], training=True, **pool,
    )  # fmt: skip
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    assert output.dtype == dtype
    for grad, want in zip(grads, wanted, strict=True):
        # A gradient of the output, of 17 * 80 terms, was itself rounded to `dtype`.
        assert_close(grad, want, dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_affine_and_without_statistics(layout, training):
    input, vectors, statistics = problem((4, 9, 8, 10), torch.float32, torch.float32, layout, affine=False)
    assert_same_as_reference(input, vectors, statistics, torch.float32, training=training)
    if training:
        output = batch_norm_relu_pool2d(input, None, None, training=True)
        expected = reference.batch_norm_relu_pool2d(input.double(), None, None, training=True)
        assert_close(output, expected, torch.float32)


@needs_native
def test_large_mean():
    """Variance must survive a mean that is large beside it."""
    input = problem((8, 5, 30, 30), torch.float64, torch.float64)[0]
    for layout in ("contiguous", "channels_last"):
        shifted = cases.in_layout((input + 3000).float(), layout)
        mean, var = torch.zeros(5), torch.zeros(5)
        batch_norm_relu_pool2d(shifted, mean, var, training=True, momentum=1.0)
        torch.testing.assert_close(var.double(), shifted.double().var(dim=(0, 2, 3)), rtol=1e-4, atol=0)
        torch.testing.assert_close(mean.double(), shifted.double().mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(value, training):
    input, vectors, statistics = problem((2, 5, 8, 8), torch.float32, torch.float32)
    input[0, 2, 3, 3] = value
    output, grads, after = run(batch_norm_relu_pool2d, input, vectors, statistics, training=training)
    expected, wanted, moved = run(reference.batch_norm_relu_pool2d, input, vectors, statistics, training=training)
    for have, want in zip((output, *grads, *after), (expected, *wanted, *moved), strict=True):
        torch.testing.assert_close(have, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "pool", [{}, {"pool": "avg"}, {"pool": None}, {"activation": None, "pool_size": 3, "pool_stride": 2}], ids=str
)
def test_gradcheck(pool, training):
    input, vectors, statistics = problem((2, 3, 6, 5), torch.float64, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (input, *vectors)]

    def function(x, weight, bias):
        return batch_norm_relu_pool2d(x, *(s.clone() for s in statistics), weight, bias, training=training, **pool)

    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves, atol=1e-4)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pool", ["max", "avg", None])
@pytest.mark.parametrize("fixed", [True, False])
def test_opcheck(fixed, pool, layout, dtype):
    input, vectors, statistics = problem((2, 5, 8, 9), dtype, torch.float32, layout)
    tensors = [t.requires_grad_() for t in (input, *vectors)]
    given = statistics if fixed else [None, None]
    window = ["relu", pool, [3, 3], [2, 2], [1, 1], True]
    op = torch.ops.dlfast._batch_norm_relu_pool2d.default
    torch.library.opcheck(op, (*tensors, *given, 1e-5, *window, True))
    output, winner_mask, kept = (t.detach() for t in op(*tensors, *given, 1e-5, *window, True))
    for have, want in zip(kept, statistics if fixed else [], strict=False):
        assert torch.equal(have, want.to(have.dtype))
    grad = torch.randn_like(output)
    plain = [t.detach() for t in tensors]
    torch.library.opcheck(
        torch.ops.dlfast._batch_norm_relu_pool2d_backward.default,
        (grad, *plain[:2], kept, winner_mask, not fixed, 1e-5, *window, [True, True, True]),
    )


@needs_native
def test_saves_the_input_and_a_byte_per_pooled_element():
    layer = dlfast.nn.BNReLUPool2d(16)
    x = torch.randn(4, 16, 20, 20, requires_grad=True)
    kept, output = saved_bytes(lambda *_: layer(x), x, *layer.parameters(), *layer.buffers())
    assert output.numel() <= kept <= output.numel() + 16 * 5 * 4  # and five numbers of a channel
    layer = dlfast.nn.BNReLUPool2d(16, pool="avg")
    kept, _ = saved_bytes(lambda *_: layer(x), x, *layer.parameters(), *layer.buffers())
    assert kept <= 16 * 5 * 4


def test_refused_by_name():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="activation must be"):
        batch_norm_relu_pool2d(x, None, None, training=True, activation="gelu")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_relu_pool2d(x[:1, :, :1, :1], None, None, training=True, pool=None)
    with pytest.raises(RuntimeError):
        batch_norm_relu_pool2d(x, torch.zeros(4), torch.ones(4))
    with pytest.raises(RuntimeError, match=r"pool_size|Output size is too small"):  # PyTorch's words without our own
        batch_norm_relu_pool2d(x, torch.zeros(3), torch.ones(3), pool_size=9)


def plain_layers(conv, bn, activation, pool):
    steps = [conv, bn, *([nn.ReLU()] if activation else []), *([pool] if pool is not None else [])]
    return nn.Sequential(*steps)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), None])
def test_layer_trains_and_evaluates_as_its_parts(pool, options, momentum):
    torch.manual_seed(0)
    import copy

    conv, bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=momentum, **options)
    if bn.affine:
        nn.init.normal_(bn.weight)  # some negative
    plain = copy.deepcopy(plain_layers(conv, bn, "relu", pool))
    layer = dlfast.nn.ConvBNReLUPool2d.from_modules(conv, bn, pool)
    assert layer.weight is conv.weight
    x = torch.randn(4, 3, 10, 10)
    for mode in (True, True, False, True, False):
        layer.train(mode)
        plain.train(mode)
        y, z = layer(x), plain(x)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-3)
        for (name, have), want in zip(layer.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(have, want, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_input_without_a_batch_is_refused_as_by_batch_norm(training):
    layer = dlfast.nn.ConvBNReLUPool2d(3, 8, 3).train(training)
    with torch.no_grad(), pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        layer(torch.randn(3, 10, 10))
