"""Number formats of states and parameters, in PyTorch: what the native step reads and writes, bit for bit.

Elements count in the order of memory; tensors here are flat, in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE_BLOCK = 256  # numbers that share a scale
CODE_VERSION = 1
_LEAST_SCALE = 2.0**-100
_ONE = 127 << 23  # the bits of 1.0
_MASK = 0xFFFFFFFF


def in_memory_order(t: Tensor) -> Tensor:
    """A flat view of `t`, which has no gaps, in the order of memory.

    >>> in_memory_order(torch.tensor([[1, 2], [3, 4]]).t())
    tensor([1, 2, 3, 4])
    """
    return t.detach().as_strided((t.numel(),), (1,))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors of 32-bit numbers (Salmon et al., "Parallel random numbers", 2011)."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64
        c0, c2 = (product1 >> 32 & _MASK) ^ c1 ^ key0, (product0 >> 32 & _MASK) ^ c3 ^ key1
        c1, c3 = product1 & _MASK, product0 & _MASK
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_bits(count: int, seed: int, step: int, stream: int, device: torch.device) -> Tensor:
    """16 random bits for each of `count` elements, int64 [count]; `stream` tells tensors and states apart.

    64 elements take eight counters: counter l of tile t is 8 t + l, and element 16 w + 8 h + l of the tile
    has half h of its word w.
    """
    tiles = (count + 63) // 64
    low = torch.arange(tiles * 8, dtype=torch.int64, device=device)
    zero = torch.zeros_like(low)
    high = (low >> 32) | (step >> 32) << 16
    words = philox((low & _MASK, high, zero + stream, zero + (step & _MASK)), seed)
    halves = [half.view(tiles, 8) for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).flatten()[:count]


def round_stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 `x` rounded to `dtype`, up with the probability of how far up it lies; 16 `random` bits each."""
    bits = x.view(torch.int32).to(torch.int64) & _MASK
    magnitude = bits & 0x7FFFFFFF
    nearest = x.to(dtype)
    if dtype is torch.bfloat16:
        rounded = (bits + random) >> 16
        # What would be finite rounded to nearest stays finite.
        rounded = torch.where((magnitude >= 0x7F7F0000) & (magnitude < 0x7F7F8000), bits >> 16, rounded)
        out = _as_int16(rounded).view(dtype)
    else:
        random = random >> 3
        normal = (magnitude + random - (112 << 23)) >> 13
        small = magnitude < 0x38800000
        units = x.abs() * 2.0**24 + random.to(torch.float32) * 2.0**-13
        subnormal = torch.where(small, units, 0).to(torch.int64)
        value = torch.where(small, subnormal, normal).clamp(max=0x7BFF)
        value = torch.where(magnitude >= 0x477FF000, 0x7C00, value)
        out = _as_int16(value | (bits >> 16 & 0x8000)).view(dtype)
    return torch.where(x.isnan(), nearest, out)


def _as_int16(bits: Tensor) -> Tensor:
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16)


# ---- Masters in halves: bfloat16 holds the upper half, rounded to nearest with ties away from zero ---------


def split_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as (bfloat16, int16): the rounded value and the lower 16 bits.

    >>> x = torch.tensor([1.2345678])
    >>> torch.equal(join_halves(*split_halves(x)), x)
    True
    """
    bits = x.view(torch.int32).to(torch.int64) & _MASK
    bits = torch.where(x.isnan(), 0x7FC00000, bits)
    return _as_int16((bits + 0x8000) >> 16 & 0xFFFF).view(torch.bfloat16), _as_int16(bits & 0xFFFF)


def join_halves(upper: Tensor, lower: Tensor) -> Tensor:
    bits = (upper.view(torch.int16).to(torch.int64) << 16) + lower.to(torch.int64)
    return _as_float(bits & _MASK)


def _as_float(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


# ---- int8: a float of 8 bits relative to the largest magnitude of its block ---------------------------------
# Code 0 is 0; code c > 0 stands for (1 + mantissa) * 2^exponent / top of that magnitude, where the bits of
# c - 1 are exponent and mantissa: 4 and 4 bits of an unsigned code, 4 and 3 beside the sign of a signed one.


def _code(signed: bool) -> tuple[int, float, int]:
    """Bits of a float's mantissa that a code drops, the number that the largest code has, and that code."""
    return (20, 57344.0, 127) if signed else (19, 61440.0, 255)


def blocks_of(count: int) -> int:
    return -(-count // CODE_BLOCK)


def encode(x: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 [n] as codes, uint8 [n], and scales, float32 [blocks].

    With `random` bits rounding is stochastic and unbiased, but for what lies below the smallest unsigned code:
    that becomes the smallest code, never 0. Without, it is to nearest.
    """
    shift, top, largest_code = _code(signed)
    count = x.numel()
    padded = torch.nn.functional.pad(x.abs(), (0, blocks_of(count) * CODE_BLOCK - count))
    scale = padded.view(-1, CODE_BLOCK).amax(dim=1) if count else x.new_empty(0)
    scale = torch.where((scale > 0) & (scale < _LEAST_SCALE), _LEAST_SCALE, scale)
    inverse = torch.where(scale > 0, top / scale, 0).repeat_interleave(CODE_BLOCK)[:count]
    y = x.abs() * inverse
    draw = torch.full((count,), 0x8000, device=x.device) if random is None else random
    dither = (draw << (shift - 16)) + (0 if random is None else 1 << (shift - 17))
    code = (((y.view(torch.int32).to(torch.int64) - _ONE + dither) >> shift) + 1).clamp(max=largest_code)
    small = y > (draw.to(torch.float32) + 0.5) * 2.0**-16 if signed else y > 0
    code = torch.where(y < 1, small.to(torch.int64), code)
    if signed:
        code = code | x.signbit().to(torch.int64) << 7
    return (code & 0xFF).to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The numbers of :func:`encode`, float32 [n].

    >>> codes, scale = encode(torch.tensor([1.0, -0.5, 0.0]), signed=True)
    >>> decode(codes, scale, signed=True)
    tensor([ 1.0000, -0.5000,  0.0000])
    """
    shift, top, _ = _code(signed)
    code = codes.to(torch.int64)
    magnitude = code & 0x7F if signed else code
    bits = torch.where(magnitude == 0, 0, (magnitude - 1 << shift) + _ONE)
    if signed:
        bits = bits | (code & 0x80) << 24
    return _as_float(bits) * (scale / top).repeat_interleave(CODE_BLOCK)[: codes.numel()]
