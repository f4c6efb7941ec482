"""The CUDA kernels of batch normalisation + ReLU + pooling, against plain PyTorch in float64 on the CPU.

Ordinary CUDA tests: they run on a GPU, and under the emulator, which is why the shapes are small.
"""

from __future__ import annotations

import pytest
import torch

import dlfast
from dlfast import reference
from dlfast.nn import batch_norm_relu_pool2d
from tests.functional.test_batch_norm_relu_pool import assert_close, problem, run
from tests.functional.test_relu_pool_cuda import DTYPES, FORMATS, misaligned, name
from tests.support.autograd import saved_bytes
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS

# Channels and widths that fill packs of every dtype, and that do not.
EVEN, ODD, WIDE = (2, 16, 6, 8), (3, 5, 7, 9), (1, 40, 5, 8)
POOLS = {
    "none": {"pool": None},
    "linear": {"pool": None, "activation": None},
    "max2": {},
    "max2ceil": {"ceil_mode": True},
    "max3s2p1": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "max3s1": {"pool_size": 3, "pool_stride": 1, "activation": None},
    "max2x3": {"pool_size": (2, 3), "pool_stride": (1, 2), "pool_padding": (1, 0), "ceil_mode": True},
    "maxwide": {"pool_size": (17, 16), "pool_stride": 3, "pool_padding": (8, 8)},
    "avg2": {"pool": "avg"},
    "avg3s2p1": {"pool": "avg", "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
}


def place(tensor, offset=0):
    return None if tensor is None else (misaligned(tensor.cuda(), offset) if offset else tensor.cuda())


def case(shape, dtype, memory_format, parameter_dtype=None, affine=True):
    """As `problem`, with parameters in what is computed in."""
    wide = parameter_dtype or torch.promote_types(dtype, torch.float32)
    input, vectors, statistics = problem(shape, dtype, wide, affine=affine)
    return input.contiguous(memory_format=memory_format), vectors, statistics


def check(input, vectors, statistics, offset=0, **options):
    """Forward, all gradients and the running statistics; the operator must have run, not the reference."""
    leaves = [place(t, offset) for t in (input, *vectors)]
    leaves = [t if t is None else t.detach().requires_grad_() for t in leaves]
    mine = [place(s, offset) for s in statistics]
    with dlfast.ran.watch() as ran:
        output = batch_norm_relu_pool2d(leaves[0], *mine, *leaves[1:], **options)
    assert [(r.device, r.part) for r in ran] == [("cuda", "forward")]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    last = output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    grad = grad.to(output.dtype).contiguous(memory_format=memory_format)
    output.backward(place(grad, offset))
    grads = [leaf.grad for leaf in leaves if leaf is not None]

    wide = [v if v is None else v.double() for v in vectors]
    wide_leaves = [t if t is None else t.clone().requires_grad_() for t in (input.double(), *wide)]
    moved = [s.double() for s in statistics]
    expected = reference.batch_norm_relu_pool2d(wide_leaves[0], *moved, *wide_leaves[1:], **options)
    expected.backward(grad.double())
    wanted = [leaf.grad for leaf in wide_leaves if leaf is not None]
    assert expected.ne(0).any()
    assert_close(output.detach().cpu(), expected.detach(), input.dtype)
    for have, want in zip(grads, wanted, strict=True):
        assert_close(have.cpu(), want, input.dtype)
    for have, want in zip(mine, moved, strict=True):
        assert_close(have.cpu(), want, have.dtype)
    if input.is_contiguous(memory_format=torch.channels_last):
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert grads[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name)
def test_batch_statistics(dtype, memory_format, pool):
    for shape in (EVEN, ODD):
        check(*case(shape, dtype, memory_format), training=True, **POOLS[pool])


@pytest.mark.parametrize("pool", ["none", "max2", "max3s2p1", "avg2"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("affine", [True, False])
def test_fixed_statistics(affine, memory_format, pool):
    for dtype, shape in ((torch.float32, EVEN), (torch.float64, ODD)):
        check(*case(shape, dtype, memory_format, affine=affine), training=False, **POOLS[pool])


@pytest.mark.parametrize("pool", ["none", "max2", "max3s2p1"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
def test_without_affine(memory_format, pool):
    check(*case(WIDE, torch.float32, memory_format, affine=False), training=True, **POOLS[pool])


def apart(shape):
    """Values so far apart that 16 bits hold them, and that no rounding decides a maximum: all of a channel differ."""
    plane = shape[0] * shape[2] * shape[3]
    generator = torch.Generator().manual_seed(plane)
    order = torch.stack([torch.randperm(plane, generator=generator) for _ in range(shape[1])], 1)
    values = (order - plane // 2).double() / 32 + 1 / 64
    return values.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("pool", ["none", "linear", "max2", "max3s2p1", "max3s1", "maxwide", "avg2"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=name)
def test_16_bit(dtype, memory_format, pool):
    for shape in ((2, 16, 6, 8), (1, 5, 7, 9)):
        _, vectors, statistics = case(shape, dtype, memory_format)
        input = apart(shape).to(dtype).contiguous(memory_format=memory_format)
        check(input, vectors, statistics, training=True, **POOLS[pool])


@pytest.mark.parametrize("pool", ["none", "max2", "max3s2p1", "avg2"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_storage_offsets(dtype, memory_format, pool):
    """Tensors that begin off a 16-byte boundary, where the aligned case takes wide accesses."""
    _, vectors, statistics = case(EVEN, dtype, memory_format)
    input = apart(EVEN).to(dtype).contiguous(memory_format=memory_format)
    for training in (True, False):
        check(input, vectors, statistics, offset=1, training=training, **POOLS[pool])


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("shape", [(3, 2, 50, 40), (40, 24, 3, 3), (2, 300, 2, 2), (6, 8, 1, 1)], ids=str)
def test_many_blocks(shape, memory_format):
    """Sums over several blocks and pieces of planes, more channels than a block takes, and planes of one element."""
    check(*case(shape, torch.float32, memory_format), training=True, pool=None)
    if shape[2] > 1:
        check(*case(shape, torch.float32, memory_format), training=True, pool_size=shape[3] if shape[3] < 4 else 2)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_variance_survives_a_large_mean(dtype, memory_format):
    shape = (4, 8, 16, 16)
    far = 3000 if dtype == torch.float32 else 1e7
    input = (problem(shape, torch.float64, torch.float64)[0] + far).to(dtype).contiguous(memory_format=memory_format)
    input[0, :, 0, 0] = 0.9 * far  # an outlier where the first thread begins
    mean, var = torch.zeros(8, dtype=dtype, device="cuda"), torch.zeros(8, dtype=dtype, device="cuda")
    batch_norm_relu_pool2d(input.cuda(), mean, var, training=True, momentum=1.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(var.cpu().double(), input.double().var(dim=(0, 2, 3)), rtol=200 * eps, atol=0)
    torch.testing.assert_close(mean.cpu().double(), input.double().mean(dim=(0, 2, 3)), rtol=4 * eps, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(value, training):
    input, vectors, statistics = problem((2, 5, 8, 8), torch.float32, torch.float32)
    input[0, 2, 3, 3] = value
    input[0, 3, 0, 0] = value  # where sums begin
    for pool in ({}, {"pool": None}):
        leaves = [[None if t is None else place(t) for t in group] for group in ([input], vectors, statistics)]
        output, grads, after = run_on_cuda(*leaves, training=training, **pool)
        expected, wanted, moved = run(
            reference.batch_norm_relu_pool2d, input, vectors, statistics, training=training, **pool
        )
        for have, want in zip((output, *grads, *after), (expected, *wanted, *moved), strict=True):
            torch.testing.assert_close(have.cpu(), want, equal_nan=True, rtol=1e-4, atol=1e-4)


def run_on_cuda(input, vectors, statistics, **options):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (*input, *vectors)]
    mine = [s.clone() for s in statistics]
    output = batch_norm_relu_pool2d(leaves[0], *mine, *leaves[1:], **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad.to(output).contiguous())
    return output.detach(), [leaf.grad for leaf in leaves], mine


def test_ties_go_to_the_first_and_codes_are_those_of_the_pass_after_a_convolution():
    generator = torch.Generator().manual_seed(0)
    input = torch.randint(-2, 3, (2, 8, 8, 8), generator=generator).float()
    for memory_format in FORMATS:
        x = input.cuda().contiguous(memory_format=memory_format)
        ones, zeros = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
        window = ("relu", "max", [3, 3], [2, 2], [1, 1], False)
        op = torch.ops.dlfast._batch_norm_relu_pool2d.default
        output, winner_mask, statistics = op(x, None, None, zeros, ones, 0.0, *window, True)
        same, winner_masks = torch.ops.dlfast._relu_pool2d(x, None, *window, True)
        assert torch.equal(output.cpu(), same.cpu())
        assert torch.equal(winner_mask.cpu(), winner_masks.cpu())
        assert winner_mask.dtype == torch.uint8
        assert winner_masks.cpu().ne(255).any()
        assert statistics.shape == (5, 8)
        _, nothing, _ = op(x, None, None, zeros, ones, 0.0, *window, False)
        assert nothing.numel() == 0


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
def test_the_same_bits_on_every_run(memory_format):
    input, vectors, statistics = case((8, 24, 12, 10), torch.float32, memory_format)
    for pool in (POOLS["max3s2p1"], POOLS["none"]):
        first, second = (
            run_on_cuda([input.cuda()], [v.cuda() for v in vectors], [s.cuda() for s in statistics],
                        training=True, **pool) for _ in range(2)
        )  # fmt: skip
        for a, b in zip((first[0], *first[1], *first[2]), (second[0], *second[1], *second[2]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", ["none", "max2", "avg2"])
def test_second_derivatives(pool, training):
    input, vectors, statistics = case((2, 3, 4, 4), torch.float64, torch.contiguous_format)
    results = []
    for function, device in ((batch_norm_relu_pool2d, "cuda"), (reference.batch_norm_relu_pool2d, "cpu")):
        leaves = [t.to(device).requires_grad_() for t in (input, *vectors)]
        output = function(leaves[0], *(s.to(device) for s in statistics), *leaves[1:], training=training, **POOLS[pool])
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for have, want in zip(*results, strict=True):
        assert want.ne(0).any()
        torch.testing.assert_close(have.cpu(), want, rtol=1e-9, atol=1e-9)


def test_layers_train_on_cuda_as_their_parts():
    torch.manual_seed(0)
    bn = torch.nn.BatchNorm2d(8)
    torch.nn.init.normal_(bn.weight)
    layer = dlfast.nn.BNReLUPool2d(8)
    layer.load_state_dict(bn.state_dict())
    layer.cuda()
    x = torch.randn(4, 8, 10, 10)
    for mode in (True, True, False):
        layer.train(mode)
        bn.train(mode)
        plain = torch.nn.functional.max_pool2d(bn(x).relu(), 2)
        ours = layer(x.cuda())
        torch.testing.assert_close(ours.cpu(), plain, rtol=1e-5, atol=1e-5)
        ours.square().sum().backward()
        plain.square().sum().backward()
        torch.testing.assert_close(layer.weight.grad.cpu(), bn.weight.grad, rtol=1e-4, atol=1e-3)
    for have, want in zip(layer.state_dict().values(), bn.state_dict().values(), strict=True):
        torch.testing.assert_close(have.cpu(), want)


def test_saves_the_input_and_a_byte_per_pooled_element():
    x = torch.randn(4, 16, 20, 20, device="cuda", requires_grad=True)
    for pool, most in (("max", x.numel() // 4), ("avg", 0), (None, 0)):
        layer = dlfast.nn.BNReLUPool2d(16, pool=pool).cuda()
        kept, _ = saved_bytes(lambda *_, layer=layer: layer(x), x, *layer.parameters(), *layer.buffers())
        assert most <= kept <= most + 16 * 5 * 4  # and five numbers of a channel


@pytest.mark.gpu_only
def test_in_a_captured_graph():
    layer = dlfast.nn.BNReLUPool2d(16).cuda()
    static = torch.randn(4, 16, 12, 12, device="cuda", requires_grad=True)

    def step():
        static.grad = None
        layer.zero_grad(set_to_none=True)
        layer(static).square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        static.copy_(torch.randn_like(static))
    graph.replay()
    assert static.grad is not None
    replayed, after = static.grad.clone(), {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(before)
    step()
    assert torch.equal(static.grad, replayed)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, after[key]), key


@pytest.mark.gpu_only
@pytest.mark.parametrize("shape", [(136, 4, 2048, 2048), (1, 1, 46400, 46400)], ids=["images", "one_image"])
@pytest.mark.parametrize("pool", ["max", None])
def test_more_than_2_to_31_elements(shape, pool):
    """Beyond 32-bit indices, by many images and by one."""
    input = torch.empty(shape, device="cuda", dtype=torch.float16).normal_().requires_grad_()
    weight = torch.ones(shape[1], device="cuda", requires_grad=True)
    bias = torch.zeros(shape[1], device="cuda", requires_grad=True)
    mean, var = torch.zeros(shape[1], device="cuda"), torch.zeros(shape[1], device="cuda")
    output = batch_norm_relu_pool2d(input, mean, var, weight, bias, training=True, momentum=1.0, pool=pool)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=1e-3, atol=0)
    output.backward(torch.ones_like(output))
    # A normalised gradient has neither a sum nor a part along the input.
    assert input.grad is not None
    tail = slice(-64, None)
    live = input.detach()[-1:, -1:, tail].float()
    normal = ((live - mean[-1]) / var[-1].sqrt()).relu()
    expected = normal if pool is None else torch.nn.functional.max_pool2d(normal, 2)
    rows = expected.shape[2]
    torch.testing.assert_close(output.detach()[-1:, -1:, -rows:].float(), expected, rtol=2e-3, atol=2e-3)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, (output > 0).sum(dim=(0, 2, 3)).float(), rtol=1e-3, atol=0)
