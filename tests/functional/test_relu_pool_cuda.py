"""The CUDA kernels of bias + ReLU + pooling, against plain PyTorch in float64 on the CPU.

Ordinary CUDA tests: they run on a GPU, and under the emulator, which is why the shapes are small.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dlfast
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


@dataclass(frozen=True)
class Pooling:
    pool: str | None
    size: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False

    @property
    def args(self) -> tuple:
        return self.pool, self.size, self.stride, self.padding, self.ceil_mode

    def fits(self, shape: tuple[int, ...]) -> bool:
        pairs = zip(shape[2:], self.size, self.padding, strict=True)
        return self.pool is None or all(n + 2 * p >= k for n, k, p in pairs)

    def reference(self, value: Tensor) -> Tensor:
        if self.pool == "max":
            return F.max_pool2d(value, self.size, self.stride, self.padding, 1, self.ceil_mode)
        if self.pool == "avg":
            return F.avg_pool2d(value, self.size, self.stride, self.padding, self.ceil_mode)
        return value


WINDOWS = [
    ((1, 1), (1, 1), (0, 0), False),
    ((1, 1), (2, 3), (0, 0), False),
    ((2, 2), (2, 2), (0, 0), False),
    ((2, 2), (2, 2), (0, 0), True),
    ((2, 2), (2, 2), (1, 1), True),
    ((2, 2), (1, 1), (0, 0), False),
    ((2, 2), (1, 2), (1, 0), False),
    ((2, 2), (3, 3), (1, 1), False),
    ((3, 3), (3, 3), (0, 0), False),
    ((3, 3), (2, 2), (1, 1), False),
    ((3, 3), (2, 2), (0, 0), True),
    ((3, 3), (1, 1), (1, 1), False),
    ((2, 3), (2, 3), (0, 0), False),
    ((2, 3), (1, 2), (1, 1), True),
    ((5, 5), (5, 5), (2, 2), False),
    ((5, 5), (2, 3), (2, 1), True),
    ((17, 17), (4, 6), (8, 7), True),
    ((17, 15), (5, 5), (8, 7), False),  # exactly 255 positions: the last window of one-byte winner_masks
]

# Channels and widths that fill packs and that do not, odd heights, planes that share a block.
SHAPES = [
    (2, 8, 8, 16),
    (1, 16, 7, 8),
    (2, 3, 10, 10),
    (1, 7, 9, 6),
    (1, 33, 5, 7),
    (3, 1, 12, 13),
]


def name(case: object) -> str:
    if isinstance(case, tuple):
        size, stride, padding, ceil_mode = case
        text = "x".join(map(str, size)) + "s" + "x".join(map(str, stride)) + "p" + "x".join(map(str, padding))
        return text + ("ceil" if ceil_mode else "")
    return str(case).removeprefix("torch.")


def misaligned(tensor: Tensor, offset: int) -> Tensor:
    """A copy with the same strides that starts `offset` elements into its storage."""
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.size(), tensor.stride(), offset).copy_(tensor)


def make_input(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, special: bool = True
) -> Tensor:
    """Few distinct values, so that windows tie; some zeros of both signs, NaN and infinities."""
    generator = torch.Generator().manual_seed(sum(shape))
    z = torch.randint(-6, 7, shape, generator=generator).to(torch.float64) / 4
    if special:
        dice = torch.rand(shape, generator=generator)
        for value, low in ((math.nan, 0.98), (math.inf, 0.96), (-math.inf, 0.92), (-0.0, 0.88)):
            z = torch.where((dice >= low) & (dice < low + 0.02), value, z)
        z[:, :1, : shape[2] // 2] = -math.inf  # whole windows of it
    return z.to(dtype).contiguous(memory_format=memory_format)


def make_bias(channels: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return (torch.randint(-4, 5, (channels,), generator=generator) / 8).to(dtype)


def reference(
    z: Tensor, bias: Tensor | None, activation: str | None, pooling: Pooling
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, differentiable: leaf, value after the activation, pooled value."""
    wide = torch.promote_types(z.dtype, torch.float32)
    value = z.to(wide) if bias is None else z.to(wide) + bias.to(wide).view(1, -1, 1, 1)
    leaf = value.double().requires_grad_()
    active = F.relu(leaf) if activation == "relu" else leaf
    return leaf, active, pooling.reference(active)


def assert_equal(actual: Tensor, expected: Tensor, what: str, exact: bool = False) -> None:
    dtype = actual.dtype
    expected = expected.detach()
    assert expected.ne(0).any(), f"{what}: this case would not notice zeros"
    # Where sums are rounded once to dtype, half a unit in the last place, and some of the accumulator's.
    eps = torch.finfo(dtype).eps
    rtol, atol = (0.0, 0.0) if exact else ((1e-14, 1e-14) if eps < 1e-9 else (max(0.6 * eps, 1e-6), 1e-6))
    torch.testing.assert_close(
        actual.cpu().double(), expected.to(dtype).double() if exact else expected,
        rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


def assert_winner_mask(
    winner_mask: Tensor, leaf: Tensor, z: Tensor, output: Tensor, activation: str | None, p: Pooling
) -> None:
    """`winner_mask` is what params.h says, from PyTorch's own choice of the winners."""
    if p.pool == "max":
        wide = p.size[0] * p.size[1] > 255
        assert winner_mask.dtype == (torch.int32 if wide else torch.uint8)
        assert winner_mask.stride() == output.stride()
        window = (p.size, p.stride, p.padding, 1, p.ceil_mode)
        _, winner = F.max_pool2d(leaf.detach(), *window, return_indices=True)
        row = torch.arange(output.size(2)).view(-1, 1) * p.stride[0] - p.padding[0]
        column = torch.arange(output.size(3)) * p.stride[1] - p.padding[1]
        expected = (winner // z.size(3) - row) * p.size[1] + winner % z.size(3) - column
        if activation == "relu":
            pooled = p.reference(leaf.detach())
            expected = torch.where(pooled <= 0, -1 if wide else 255, expected)
        assert torch.equal(winner_mask.cpu().long(), expected)
    elif p.pool == "avg" and activation == "relu":
        assert winner_mask.dtype == torch.uint8
        bytes = (z.numel() + 7) // 8
        assert winner_mask.shape in ((bytes,), (bytes, 1))
        passes = ~(leaf.detach() <= 0)
        order = (0, 2, 3, 1) if z.is_contiguous(memory_format=torch.channels_last) else (0, 1, 2, 3)
        bits = (winner_mask.cpu().view(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1
        assert torch.equal(bits.view(-1)[: z.numel()].bool(), passes.permute(order).reshape(-1))
    else:
        assert winner_mask.numel() == 0


def check(z: Tensor, bias: Tensor | None, activation: str | None, p: Pooling, offset: int = 0) -> None:
    """Forward, backward and transpose of one problem; tensors begin `offset` elements into their storage."""
    what = f"{tuple(z.shape)} {z.dtype} {activation} {p} bias={bias is not None}"
    last = z.stride(1) == 1 and z.size(1) > 1
    memory_format = torch.channels_last if last else torch.contiguous_format

    def place(tensor: Tensor) -> Tensor:
        on_device = tensor.to("cuda")
        return misaligned(on_device, offset) if offset else on_device

    leaf, _, expected = reference(z, bias, activation, p)
    z_cuda = place(z)
    bias_cuda = None if bias is None else place(bias)
    output, winner_mask = torch.ops.dlfast._relu_pool2d(z_cuda, bias_cuda, activation, *p.args, True)
    assert output.dtype == z.dtype
    assert output.is_contiguous(memory_format=memory_format)
    assert_equal(output, expected, f"forward {what}", exact=p.pool != "avg")
    assert_winner_mask(winner_mask, leaf, z, output, activation, p)
    without, none = torch.ops.dlfast._relu_pool2d(z_cuda, bias_cuda, activation, *p.args, False)
    assert torch.equal(without.nan_to_num(7), output.nan_to_num(7))
    assert none.numel() == 0

    saved = output if p.pool is None else winner_mask
    saved = misaligned(saved, offset) if offset else saved
    generator = torch.Generator().manual_seed(7)
    grad = (torch.randn(expected.shape, generator=generator) + 0.1).to(z.dtype)
    grad = grad.contiguous(memory_format=memory_format)
    wide_grad = grad.double().requires_grad_()
    (expected_grad,) = torch.autograd.grad(expected, leaf, wide_grad, create_graph=True)
    disjoint = p.pool == "max" and all(k <= s for k, s in zip(p.size, p.stride, strict=True))
    grad_z = torch.ops.dlfast._relu_pool2d_backward(place(grad), saved, z.shape[2:], activation, *p.args)
    assert grad_z.is_contiguous(memory_format=memory_format)
    assert_equal(grad_z, expected_grad, f"backward {what}", exact=disjoint or p.pool is None)

    cotangent = torch.randn(z.shape, generator=generator).to(z.dtype).contiguous(memory_format=memory_format)
    (expected_transpose,) = torch.autograd.grad(expected_grad, wide_grad, cotangent.double())
    transpose = torch.ops.dlfast._relu_pool2d_transpose(place(cotangent), saved, activation, *p.args)
    assert transpose.is_contiguous(memory_format=memory_format)
    assert_equal(transpose, expected_transpose, f"transpose {what}", exact=p.pool != "avg")


def options(index: int) -> tuple[bool, str | None]:
    """With bias or not, with ReLU or not, in turn."""
    return index % 2 == 0, ("relu" if index % 4 < 2 else None)


@pytest.mark.parametrize("window", WINDOWS, ids=name)
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_pooling(dtype, memory_format, pool, window):
    p = Pooling(pool, *window)
    cases = 0
    for i, shape in enumerate(SHAPES):
        if not p.fits(shape):
            continue
        # A large average would be NaN everywhere.
        z = make_input(shape, dtype, memory_format, special=pool == "max" or p.size[0] * p.size[1] < 10)
        for turn in (i, i + 1 + 2 * (i % 2)):  # every shape with ReLU, and some without
            with_bias, activation = options(turn)
            check(z, make_bias(shape[1], dtype) if with_bias else None, activation, p)
            cases += 1
    assert cases >= 2


@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_without_pooling(dtype, memory_format):
    for shape in SHAPES:
        for with_bias, activation in itertools.product((True, False), ("relu", None)):
            bias = make_bias(shape[1], dtype) if with_bias else None
            check(make_input(shape, dtype, memory_format), bias, activation, Pooling(None))


@pytest.mark.parametrize("pool", ["max", "avg", None])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_storage_offsets(dtype, memory_format, pool):
    """Tensors that begin off a 16-byte boundary, where the aligned case takes wide accesses."""
    for window in (WINDOWS[2], WINDOWS[9]):
        for offset in (1, 4):
            z = make_input((2, 16, 8, 16), dtype, memory_format)
            check(z, make_bias(16, dtype), "relu", Pooling(pool, *window), offset)


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("window", [WINDOWS[3], WINDOWS[9], WINDOWS[15]], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_large_planes(dtype, window, pool):
    """Planes of several blocks each, with an overlap between them, and rows no block can hold."""
    check(make_input((1, 2, 75, 65), dtype, torch.contiguous_format), make_bias(2, dtype), "relu",
          Pooling(pool, *window))  # fmt: skip
    check(make_input((1, 1, 5, 10001), dtype, torch.contiguous_format), None, "relu", Pooling(pool, *window))


@pytest.mark.parametrize("shape", [(5, 130, 4, 6), (43, 2, 6, 6)], ids=["channels", "images"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("pool", ["max", "avg", None])
def test_many_small_planes(pool, memory_format, shape):
    """More planes than fit one block, and more threads than one block has.

    A build with -DDLFAST_NARROW_INDEX_LIMIT=2000 takes the first as one problem with 64-bit indices, the
    second in groups of images.
    """
    z = make_input(shape, torch.float32, memory_format)
    bias = make_bias(shape[1], torch.float32)
    check(z, bias, "relu", Pooling(pool))
    check(z, bias, "relu", Pooling(pool, (3, 3), (1, 1), (1, 1)))


@pytest.mark.parametrize("pool", ["max", "avg", None])
def test_empty_batch(pool):
    p = Pooling(pool)
    z = torch.empty(0, 8, 6, 6, device="cuda")
    output, winner_mask = torch.ops.dlfast._relu_pool2d(z, None, "relu", *p.args, True)
    assert output.shape == p.reference(z.cpu()).shape
    grad = torch.ops.dlfast._relu_pool2d_backward(
        output, output if pool is None else winner_mask, [6, 6], "relu", *p.args
    )
    assert grad.shape == z.shape


def test_overlapping_gradients_add_up_in_the_order_of_windows():
    """Bit for bit what a sequential loop over the windows gives in float32, so the same on every run."""
    z = make_input((2, 8, 12, 12), torch.float32, torch.contiguous_format, special=False)
    leaf = z.clone().requires_grad_()
    expected = F.max_pool2d(leaf, 3, 1, 1)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    assert leaf.grad is not None
    p = Pooling("max", (3, 3), (1, 1), (1, 1))
    for memory_format in FORMATS:
        on_device = z.to("cuda").contiguous(memory_format=memory_format)
        _, winner_mask = torch.ops.dlfast._relu_pool2d(on_device, None, None, *p.args, True)
        actual = torch.ops.dlfast._relu_pool2d_backward(grad.cuda(), winner_mask, [12, 12], None, *p.args)
        assert torch.equal(actual.cpu(), leaf.grad)


def test_sums_are_rounded_once():
    """float16: 2048 + 1 is not representable; the maximum is taken before rounding."""
    z = torch.tensor([[2048.0, 2049.0], [2050.0, 2050.0]]).view(1, 1, 2, 2).to("cuda", torch.float16)
    z[0, 0, 0, 1] = 2048.0
    bias = torch.tensor([1.0], device="cuda", dtype=torch.float16)
    output, winner_mask = torch.ops.dlfast._relu_pool2d(z, bias, "relu", *Pooling("max").args, True)
    assert output.item() == 2052.0  # 2051 to even
    assert winner_mask.item() == 2
    mean, _ = torch.ops.dlfast._relu_pool2d(z, bias, "relu", *Pooling("avg").args, True)
    assert mean.item() == 2050.0  # (2049 + 2049 + 2051 + 2051) / 4


@pytest.mark.parametrize("pool", ["max", "avg", None])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=name)
def test_public_operator(dtype, memory_format, pool, monkeypatch):
    """Convolution, this pass and all three gradients, in whatever layout the convolution answers in."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    generator = torch.Generator().manual_seed(3)
    shapes = {"input": (2, 3, 12, 10), "weight": (8, 3, 3, 3), "bias": (8,)}
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes.values()]
    wide = [t.double().requires_grad_() for t in tensors]
    expected = dlfast.reference.conv_relu_pool2d(*wide, padding=1, pool=pool)
    grad = torch.randn(expected.shape, generator=generator).to(dtype)
    expected.backward(grad.double())

    ours = [t.detach().cuda() for t in tensors]
    ours[:2] = [t.contiguous(memory_format=memory_format) for t in ours[:2]]
    ours = [t.requires_grad_() for t in ours]
    output = dlfast.conv_relu_pool2d(*ours, padding=1, pool=pool)
    output.backward(grad.cuda())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-2}[dtype]
    torch.testing.assert_close(output.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    for label, actual, exact in zip(shapes, ours, wide, strict=True):
        assert actual.grad is not None
        assert exact.grad is not None
        scale = exact.grad.abs().max().item()
        error = (actual.grad.cpu().double() - exact.grad).abs().max().item()
        assert error <= tolerance * scale, label


@pytest.mark.gpu_only
@pytest.mark.parametrize("shape", [(136, 4, 2048, 2048), (1, 1, 46400, 46400)], ids=["images", "one_image"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_more_than_2_to_31_elements(shape, pool):
    """Beyond 32-bit indices, by many images and by one; the last rows against PyTorch."""
    assert math.prod(shape) > 2**31
    p = Pooling(pool)
    z = torch.empty(shape, device="cuda", dtype=torch.float16).normal_()
    output, winner_mask = torch.ops.dlfast._relu_pool2d(z, None, "relu", *p.args, True)
    tail = z[-1:, -1:, -64:].float().requires_grad_()
    expected = p.reference(F.relu(tail))
    torch.testing.assert_close(output[-1:, -1:, -32:].float(), expected, rtol=1e-3, atol=1e-3)
    grad = torch.randn_like(output)
    grad_z = torch.ops.dlfast._relu_pool2d_backward(grad, winner_mask, shape[2:], "relu", *p.args)
    expected.backward(grad[-1:, -1:, -32:].float())
    assert tail.grad is not None
    torch.testing.assert_close(grad_z[-1:, -1:, -64:].float(), tail.grad, rtol=1e-3, atol=1e-3)
