// Blocks of numbers from their formats in memory to float and back, for one SIMD level (see body.h).
// The arithmetic is in formats.h.
#pragma once

#include "core/level.h"
#include "core/low_precision.h"
#include "optim/formats.h"

namespace dlfast::optim {

template <>
struct Registers<Vec<float, DLFAST_LANES>> {
  using Bits = Vec<uint32_t, DLFAST_LANES>;
  using Integers = Vec<int32_t, DLFAST_LANES>;
  static DLFAST_INLINE Vec<float, DLFAST_LANES> from_integer(Bits x) {
    return __builtin_convertvector(bits_as<Integers>(x), Vec<float, DLFAST_LANES>);
  }
  static DLFAST_INLINE Bits to_integer(Vec<float, DLFAST_LANES> x) {
    return bits_as<Bits>(__builtin_convertvector(x, Integers));
  }
};

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

DLFAST_INLINE HalvesV narrow_random(FloatV x, BitsV random, BFloat16*) {
  return __builtin_convertvector(random_bfloat16(x, random), HalvesV);
}

DLFAST_INLINE HalvesV narrow_random(FloatV x, BitsV random, Float16*) {
  return __builtin_convertvector(random_float16(x, random), HalvesV);
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

template <bool is_signed>
void load_codes(const uint8_t* from, float scale, int64_t count, float* to) {
  using Code = Code8<is_signed>;
  const float unit = scale / Code::kTop;
  const auto decoded = [&](BytesV bytes) DLFAST_INLINE_LAMBDA {
    return Code::template decode<FloatV>(convert_integers<BitsV>(bytes)) * unit;
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
  scale = Code::scale(scale);
  const float inverse = Code::inverse(scale);
  const auto coded = [&](int64_t i) DLFAST_INLINE_LAMBDA {
    BitsV draw = BitsV{} + Code::kMiddle;
    if (random != nullptr) draw = __builtin_convertvector(load<HalvesV>(random + i), BitsV);
    const BitsV code =
        Code::encode(load<FloatV>(from + i), inverse, draw, random == nullptr ? 0 : Code::kDither);
    return convert_integers<BytesV>(code);
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

// ---- Masters in halves ------------------------------------------------------------------------------------

void join_block(const void* upper, const void* lower, int64_t count, float* to) {
  const auto* high = static_cast<const uint16_t*>(upper);
  const auto* low = static_cast<const uint16_t*>(lower);
  const auto joined = [](HalvesV h, HalvesV l) DLFAST_INLINE_LAMBDA {
    return join_halves<FloatV>(__builtin_convertvector(h, BitsV), __builtin_convertvector(l, BitsV));
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
    BitsV upper, lower;
    split_halves(load<FloatV>(from + i), upper, lower);
    h = __builtin_convertvector(upper, HalvesV);
    l = __builtin_convertvector(lower, HalvesV);
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

void random_block(uint64_t seed, uint64_t step, uint32_t stream, int64_t first, int64_t count, uint16_t* to) {
  using Lanes = Vec<uint32_t, 8>;
  constexpr Lanes kLane = {0, 1, 2, 3, 4, 5, 6, 7};
  const uint64_t end = static_cast<uint64_t>(first + count + kRandomTile - 1) / kRandomTile;
  for (uint64_t tile = static_cast<uint64_t>(first) / kRandomTile; tile < end; ++tile) {
    const auto block = random_words(seed, step, stream, tile, kLane);
    for (const Lanes& word : block.word) {
      store(to, __builtin_convertvector(word, Vec<uint16_t, 8>));
      store(to + 8, __builtin_convertvector(word >> 16, Vec<uint16_t, 8>));
      to += 16;
    }
  }
}

}  // namespace
}  // namespace dlfast::optim
