// Blocks of numbers from their formats in memory to float and back, for one SIMD level (see cpu_body.h).
//
// code8 is a float of 8 bits relative to the largest magnitude of its block of kCodeBlock numbers. Code 0 is
// 0; code c > 0 has k = c - 1 and stands for (1 + mantissa(k)) * 2^exponent(k) / kTop times that magnitude:
//   code8_unsigned  4 bits of mantissa, 4 of exponent, kTop = 1.875 * 2^15; what lies below the smallest
//                   code becomes the smallest code, never 0: a second moment errs towards small steps
//   code8_signed    1 sign bit, 3 bits of mantissa, 4 of exponent, kTop = 1.75 * 2^15
// With random bits rounding is stochastic and without bias (but for the small unsigned ones); the error is
// below 1/16 of an unsigned and 1/8 of a signed number. dlfast/optim/_formats.py is the same in PyTorch.
#pragma once

#include "common/low_precision.h"
#include "common/philox.h"
#include "optim/step.h"

namespace dlfast::optim {
namespace {

constexpr int kLanes = DLFAST_LANES;
using FloatV = Vec<float, kLanes>;
using BitsV = Vec<uint32_t, kLanes>;
using HalvesV = Vec<uint16_t, kLanes>;
using BytesV = Vec<uint8_t, kLanes>;

// Calls body(i) for whole vectors [i, i + kLanes) of [0, count), then tail(i, rest).
template <typename Body, typename Tail>
DLFAST_INLINE void for_vectors(int64_t count, Body&& body, Tail&& tail) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i);
  if (i < count) tail(i, static_cast<size_t>(count - i));
}

// For arrays of which the part after `count` may be read and written, up to a multiple of kLanes.
template <typename Body>
DLFAST_INLINE void for_padded(int64_t count, Body&& body) {
  for (int64_t i = 0; i < count; i += kLanes) body(i);
}

template <typename T>
void widen_block(const T* from, int64_t count, float* to) {
  for_vectors(
      count, [&](int64_t i) DLFAST_INLINE_LAMBDA { store(to + i, load_as<T, kLanes>(from + i)); },
      [&](int64_t i, size_t rest) {
        T last[kLanes] = {};
        std::memcpy(last, from + i, rest * sizeof(T));
        store(to + i, load_as<T, kLanes>(last));
      });
}

// Adds a random number below one unit in the last place, then truncates. NaN stays, finite stays finite
// where rounding to nearest would leave it so.
DLFAST_INLINE HalvesV narrow_random(FloatV x, BitsV random, BFloat16*) {
  const BitsV bits = bits_as<BitsV>(x);
  const BitsV rounded = (bits + random) >> 16;
  const BitsV magnitude = bits & 0x7fffffffu;
  const BitsV near_infinity = (bits >> 16) & 0xffffu;
  BitsV out = (magnitude >= 0x7f7f0000u) & (magnitude < 0x7f7f8000u) ? near_infinity : rounded;
  out = magnitude > 0x7f800000u ? ((bits >> 16) | 0x40u) : out;
  return __builtin_convertvector(out, HalvesV);
}

DLFAST_INLINE HalvesV narrow_random(FloatV x, BitsV random, Float16*) {
  const BitsV bits = bits_as<BitsV>(x);
  const BitsV magnitude = bits & 0x7fffffffu;
  const BitsV random13 = random >> 3;
  const BitsV normal = (magnitude + random13 - (112u << 23)) >> 13;
  // Below 2^-14 the unit in the last place is 2^-24.
  const FloatV units = bits_as<FloatV>(magnitude) * 0x1p24f +
                       __builtin_convertvector(bits_as<Vec<int32_t, kLanes>>(random13), FloatV) * 0x1p-13f;
  const FloatV small = magnitude < 0x38800000u ? units : FloatV{};
  const BitsV subnormal = bits_as<BitsV>(__builtin_convertvector(small, Vec<int32_t, kLanes>));
  BitsV value = magnitude < 0x38800000u ? subnormal : normal;
  value = (magnitude < 0x477ff000u) & (value > 0x7bffu) ? BitsV{} + 0x7bffu : value;
  value = magnitude >= 0x477ff000u ? BitsV{} + 0x7c00u : value;
  value = magnitude > 0x7f800000u ? BitsV{} + 0x7e00u : value;
  return __builtin_convertvector(value | ((bits >> 16) & 0x8000u), HalvesV);
}

template <typename T>
void narrow_block(const float* from, const uint16_t* random, int64_t count, T* to) {
  const auto narrowed = [&](int64_t i) DLFAST_INLINE_LAMBDA {
    const FloatV x = load<FloatV>(from + i);
    if (random == nullptr) return narrow<kLanes>(x, static_cast<T*>(nullptr));
    return narrow_random(x, __builtin_convertvector(load<HalvesV>(random + i), BitsV),
                         static_cast<T*>(nullptr));
  };
  for_vectors(
      count, [&](int64_t i) DLFAST_INLINE_LAMBDA { store(to + i, narrowed(i)); },
      [&](int64_t i, size_t rest) {
        const HalvesV last = narrowed(i);
        std::memcpy(to + i, &last, rest * sizeof(T));
      });
}

// ---- code8 ------------------------------------------------------------------------------------------------

constexpr uint32_t kOne = 127u << 23;  // the bits of 1.0f
// A block whose numbers are all smaller is scaled as if this were its largest: no inverse overflows.
constexpr float kLeastScale = 0x1p-100f;

template <bool is_signed>
struct Code8 {
  static constexpr int kShift = is_signed ? 20 : 19;  // bits of a float's mantissa that a code drops
  static constexpr float kTop = is_signed ? 57344.0f : 61440.0f;
  static constexpr uint32_t kMaxCode = is_signed ? 127 : 255;
};

template <bool is_signed>
void load_codes(const uint8_t* from, float scale, int64_t count, float* to) {
  using Code = Code8<is_signed>;
  const float unit = scale / Code::kTop;
  const auto decoded = [&](BytesV bytes) DLFAST_INLINE_LAMBDA {
    const BitsV code = __builtin_convertvector(bytes, BitsV);
    const BitsV magnitude = is_signed ? code & 0x7fu : code;
    BitsV bits = ((magnitude - 1) << Code::kShift) + kOne;
    bits = magnitude == 0 ? BitsV{} : bits;
    if constexpr (is_signed) bits = bits | ((code & 0x80u) << 24);
    return bits_as<FloatV>(bits) * unit;
  };
  for_vectors(
      count, [&](int64_t i) DLFAST_INLINE_LAMBDA { store(to + i, decoded(load<BytesV>(from + i))); },
      [&](int64_t i, size_t rest) {
        uint8_t last[kLanes] = {};
        std::memcpy(last, from + i, rest);
        store(to + i, decoded(load<BytesV>(last)));
      });
}

template <bool is_signed>
float save_codes(const float* from, const uint16_t* random, int64_t count, uint8_t* to) {
  using Code = Code8<is_signed>;
  FloatV largest = {};
  for_vectors(
      count,
      [&](int64_t i) DLFAST_INLINE_LAMBDA {
        const FloatV x = load<FloatV>(from + i);
        largest = maximum(largest, x < 0 ? -x : x);
      },
      [&](int64_t i, size_t rest) {
        FloatV x = {};
        std::memcpy(&x, from + i, rest * sizeof(float));
        largest = maximum(largest, x < 0 ? -x : x);
      });
  float scale = 0;
  for (int l = 0; l < kLanes; ++l) scale = maximum(scale, static_cast<float>(largest[l]));
  if (scale > 0 && scale < kLeastScale) scale = kLeastScale;
  const float inverse = scale > 0 ? Code::kTop / scale : 0;
  const auto coded = [&](int64_t i) DLFAST_INLINE_LAMBDA {
    const FloatV x = load<FloatV>(from + i);
    const FloatV y = (x < 0 ? -x : x) * inverse;
    BitsV draw = BitsV{} + 0x8000u;
    if (random != nullptr) draw = __builtin_convertvector(load<HalvesV>(random + i), BitsV);
    // Half of the last random bit is added, so that the mean of what is added is exactly one half.
    const BitsV dither = (draw << (Code::kShift - 16)) + (random == nullptr ? 0u : 1u << (Code::kShift - 17));
    BitsV code = ((bits_as<BitsV>(y) - kOne + dither) >> Code::kShift) + 1;
    code = code > Code::kMaxCode ? BitsV{} + Code::kMaxCode : code;
    BitsV small;
    if constexpr (is_signed) {
      const FloatV threshold =
          (__builtin_convertvector(bits_as<Vec<int32_t, kLanes>>(draw), FloatV) + 0.5f) * 0x1p-16f;
      small = y > threshold ? BitsV{} + 1u : BitsV{};
    } else {
      small = y > 0 ? BitsV{} + 1u : BitsV{};
    }
    code = y < 1 ? small : code;
    if constexpr (is_signed) code = code | ((bits_as<BitsV>(x) >> 24) & 0x80u);
    return __builtin_convertvector(code, BytesV);
  };
  for_vectors(
      count, [&](int64_t i) DLFAST_INLINE_LAMBDA { store(to + i, coded(i)); },
      [&](int64_t i, size_t rest) {
        const BytesV last = coded(i);
        std::memcpy(to + i, &last, rest);
      });
  return scale;
}

// ---- By format --------------------------------------------------------------------------------------------

void load_block(Format format, const void* from, const float* scales, int64_t first, int64_t count,
                float* to) {
  switch (format) {
    case Format::bfloat16:
      return widen_block(static_cast<const BFloat16*>(from) + first, count, to);
    case Format::float16:
      return widen_block(static_cast<const Float16*>(from) + first, count, to);
    case Format::code8_signed:
    case Format::code8_unsigned:
      for (int64_t at = 0; at < count; at += kCodeBlock) {
        const auto* codes = static_cast<const uint8_t*>(from) + first + at;
        const int64_t n = count - at < kCodeBlock ? count - at : kCodeBlock;
        const float scale = scales[(first + at) / kCodeBlock];
        if (format == Format::code8_signed) {
          load_codes<true>(codes, scale, n, to + at);
        } else {
          load_codes<false>(codes, scale, n, to + at);
        }
      }
      return;
    default:
      std::memcpy(to, static_cast<const float*>(from) + first, static_cast<size_t>(count) * sizeof(float));
  }
}

void save_block(Format format, const float* from, const uint16_t* random, int64_t first, int64_t count,
                void* to, float* scales) {
  switch (format) {
    case Format::bfloat16:
      return narrow_block(from, random, count, static_cast<BFloat16*>(to) + first);
    case Format::float16:
      return narrow_block(from, random, count, static_cast<Float16*>(to) + first);
    case Format::code8_signed:
    case Format::code8_unsigned:
      for (int64_t at = 0; at < count; at += kCodeBlock) {
        auto* codes = static_cast<uint8_t*>(to) + first + at;
        const int64_t n = count - at < kCodeBlock ? count - at : kCodeBlock;
        const uint16_t* draws = random == nullptr ? nullptr : random + at;
        scales[(first + at) / kCodeBlock] = format == Format::code8_signed
                                                ? save_codes<true>(from + at, draws, n, codes)
                                                : save_codes<false>(from + at, draws, n, codes);
      }
      return;
    default:
      std::memcpy(static_cast<float*>(to) + first, from, static_cast<size_t>(count) * sizeof(float));
  }
}

// ---- Masters in halves: the lower half is kept as it is; the upper is rounded by it, half away from zero,
// so that both together give the float back as (upper << 16) + signed lower.

void join_block(const void* upper, const void* lower, int64_t count, float* to) {
  const auto* high = static_cast<const uint16_t*>(upper);
  const auto* low = static_cast<const uint16_t*>(lower);
  const auto joined = [](HalvesV h, HalvesV l) DLFAST_INLINE_LAMBDA {
    const BitsV wide = __builtin_convertvector(l, BitsV);
    const BitsV borrow = (wide & 0x8000u) << 1;
    return bits_as<FloatV>((__builtin_convertvector(h, BitsV) << 16) + wide - borrow);
  };
  for_vectors(
      count,
      [&](int64_t i)
          DLFAST_INLINE_LAMBDA { store(to + i, joined(load<HalvesV>(high + i), load<HalvesV>(low + i))); },
      [&](int64_t i, size_t rest) {
        HalvesV h = {}, l = {};
        std::memcpy(&h, high + i, rest * sizeof(uint16_t));
        std::memcpy(&l, low + i, rest * sizeof(uint16_t));
        store(to + i, joined(h, l));
      });
}

void split_block(const float* from, int64_t count, void* upper, void* lower) {
  auto* high = static_cast<uint16_t*>(upper);
  auto* low = static_cast<uint16_t*>(lower);
  const auto split = [&](int64_t i, HalvesV& h, HalvesV& l) DLFAST_INLINE_LAMBDA {
    BitsV bits = load<BitsV>(from + i);
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? BitsV{} + 0x7fc00000u : bits;
    h = __builtin_convertvector((bits + 0x8000u) >> 16, HalvesV);
    l = __builtin_convertvector(bits & 0xffffu, HalvesV);
  };
  for_vectors(
      count,
      [&](int64_t i) DLFAST_INLINE_LAMBDA {
        HalvesV h, l;
        split(i, h, l);
        store(high + i, h);
        store(low + i, l);
      },
      [&](int64_t i, size_t rest) {
        HalvesV h, l;
        split(i, h, l);
        std::memcpy(high + i, &h, rest * sizeof(uint16_t));
        std::memcpy(low + i, &l, rest * sizeof(uint16_t));
      });
}

// ---- Random bits ------------------------------------------------------------------------------------------

// 64 numbers take eight counters, one per lane: counter l of tile t is 8 t + l, and element 16 w + 8 h + l of
// the tile has half h of its word w.
void random_block(uint64_t seed, uint64_t step, uint32_t stream, int64_t first, int64_t count, uint16_t* to) {
  using Lanes = Vec<uint32_t, 8>;
  constexpr Lanes kLane = {0, 1, 2, 3, 4, 5, 6, 7};
  const auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t end = static_cast<uint64_t>(first + count + 63) / 64;
  for (uint64_t tile = static_cast<uint64_t>(first) / 64; tile < end; ++tile) {
    // The step counts up to 2^40 and elements up to 2^37 counters: 13 bits of the step go with the latter.
    const uint64_t counter = tile * 8;
    const Lanes zero = {};
    const auto high = static_cast<uint32_t>(counter >> 32) | static_cast<uint32_t>(step >> 32) << 16;
    const auto block = philox<Lanes>({{kLane + static_cast<uint32_t>(counter), zero + high, zero + stream,
                                       zero + static_cast<uint32_t>(step)}},
                                     key0, key1);
    for (const Lanes& word : block.word) {
      store(to, __builtin_convertvector(word, Vec<uint16_t, 8>));
      store(to + 8, __builtin_convertvector(word >> 16, Vec<uint16_t, 8>));
      to += 16;
    }
  }
}

}  // namespace
}  // namespace dlfast::optim
