// What the number formats mean, as arithmetic on registers: the same source for every SIMD level and for
// CUDA.
//
// F is float, or a vector of floats; Bits<F> is uint32_t, or a vector of as many. A number of 16 bits lies in
// the lower half of its lane. Where bytes lie in memory is the business of cpu_formats.h and kernel_step.cuh.
// dlfast/optim/_formats.py is the same in PyTorch. Standard library only.
//
// code8 is a float of 8 bits relative to the largest magnitude of its block of kCodeBlock numbers. Code 0 is
// 0; code c > 0 has k = c - 1 and stands for (1 + mantissa(k)) * 2^exponent(k) / kTop times that magnitude:
//   code8_unsigned  4 bits of mantissa, 4 of exponent, kTop = 1.875 * 2^15; what lies below the smallest
//                   code becomes the smallest code, never 0: a second moment errs towards small steps
//   code8_signed    1 sign bit, 3 bits of mantissa, 4 of exponent, kTop = 1.75 * 2^15
// With random bits rounding is stochastic and without bias (but for the small unsigned ones); the error is
// below 1/16 of an unsigned and 1/8 of a signed number.
#pragma once

#include <cstring>

#include "core/philox.h"
#include "optim/step.h"

namespace dlfast::optim {

// Reinterpreting and converting the lanes of F; vectors specialise it where their width is known.
template <typename F>
struct Registers;

template <>
struct Registers<float> {
  using Bits = uint32_t;
  static DLFAST_RULE float from_integer(Bits x) { return static_cast<float>(static_cast<int32_t>(x)); }
  static DLFAST_RULE Bits to_integer(float x) { return static_cast<Bits>(static_cast<int32_t>(x)); }
};

template <typename F>
using Bits = typename Registers<F>::Bits;

template <typename F>
DLFAST_RULE Bits<F> bits_of(F x) {
  static_assert(sizeof(F) == sizeof(Bits<F>));
  Bits<F> bits;
  memcpy(&bits, &x, sizeof(F));
  return bits;
}

template <typename F>
DLFAST_RULE F number_of(Bits<F> bits) {
  F x;
  memcpy(&x, &bits, sizeof(F));
  return x;
}

constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kOne = 127u << 23;  // the bits of 1.0f

// ---- Rounding at random: adds a random number below one unit in the last place, then truncates. NaN stays,
// finite stays finite where rounding to nearest would leave it so. `random` is below 2^16.

template <typename F>
DLFAST_RULE Bits<F> random_bfloat16(F x, Bits<F> random) {
  const Bits<F> bits = bits_of(x);
  const Bits<F> rounded = (bits + random) >> 16;
  const Bits<F> magnitude = bits & 0x7fffffffu;
  const Bits<F> out = (magnitude >= 0x7f7f0000u) & (magnitude < 0x7f7f8000u) ? bits >> 16 : rounded;
  return magnitude > kInfinity ? ((bits >> 16) | 0x40u) : out;
}

template <typename F>
DLFAST_RULE Bits<F> random_float16(F x, Bits<F> random) {
  const Bits<F> bits = bits_of(x);
  const Bits<F> magnitude = bits & 0x7fffffffu;
  const Bits<F> random13 = random >> 3;
  const Bits<F> normal = (magnitude + random13 - (112u << 23)) >> 13;
  // Below 2^-14 the unit in the last place is 2^-24.
  const F units = number_of<F>(magnitude) * 0x1p24f + Registers<F>::from_integer(random13) * 0x1p-13f;
  const Bits<F> subnormal = Registers<F>::to_integer(magnitude < 0x38800000u ? units : F{});
  Bits<F> value = magnitude < 0x38800000u ? subnormal : normal;
  value = (magnitude < 0x477ff000u) & (value > 0x7bffu) ? Bits<F>{} + 0x7bffu : value;
  value = magnitude >= 0x477ff000u ? Bits<F>{} + 0x7c00u : value;
  value = magnitude > kInfinity ? Bits<F>{} + 0x7e00u : value;
  return value | ((bits >> 16) & 0x8000u);
}

// ---- code8 ------------------------------------------------------------------------------------------------

template <bool is_signed>
struct Code8 {
  static constexpr int kShift = is_signed ? 20 : 19;  // bits of a float's mantissa that a code drops
  static constexpr float kTop = is_signed ? 57344.0f : 61440.0f;
  static constexpr uint32_t kMaxCode = is_signed ? 127 : 255;
  // A block whose numbers are all smaller is scaled as if this were its largest: no inverse overflows.
  static constexpr float kLeastScale = 0x1p-100f;
  // The draw of rounding to nearest, which has no `dither` beside it.
  static constexpr uint32_t kMiddle = 0x8000u;
  // Half of the last random bit, so that the mean of what is added is exactly one half.
  static constexpr uint32_t kDither = 1u << (kShift - 17);

  static DLFAST_RULE float scale(float largest) {
    return largest > 0 && largest < kLeastScale ? kLeastScale : largest;
  }
  static DLFAST_RULE float inverse(float scale) { return scale > 0 ? kTop / scale : 0; }

  // In units of scale / kTop.
  template <typename F>
  static DLFAST_RULE F decode(Bits<F> code) {
    const Bits<F> magnitude = is_signed ? code & 0x7fu : code;
    Bits<F> bits = ((magnitude - 1) << kShift) + kOne;
    bits = magnitude == 0 ? Bits<F>{} : bits;
    if constexpr (is_signed) bits = bits | ((code & 0x80u) << 24);
    return number_of<F>(bits);
  }

  template <typename F>
  static DLFAST_RULE Bits<F> encode(F x, float inverse, Bits<F> draw, uint32_t dither) {
    const F y = (x < 0 ? -x : x) * inverse;
    Bits<F> code = ((bits_of(y) - kOne + (draw << (kShift - 16)) + dither) >> kShift) + 1;
    code = code > kMaxCode ? Bits<F>{} + kMaxCode : code;
    Bits<F> small;
    if constexpr (is_signed) {
      const F threshold = (Registers<F>::from_integer(draw) + 0.5f) * 0x1p-16f;
      small = y > threshold ? Bits<F>{} + 1u : Bits<F>{};
    } else {
      small = y > 0 ? Bits<F>{} + 1u : Bits<F>{};
    }
    code = y < 1 ? small : code;
    if constexpr (is_signed) code = code | ((bits_of(x) >> 24) & 0x80u);
    return code;
  }
};

// ---- Masters in halves: the lower half is kept as it is; the upper is rounded by it, half away from zero,
// so that both together give the float back as (upper << 16) + signed lower.

template <typename F>
DLFAST_RULE F join_halves(Bits<F> upper, Bits<F> lower) {
  return number_of<F>((upper << 16) + lower - ((lower & 0x8000u) << 1));
}

template <typename F>
DLFAST_RULE void split_halves(F x, Bits<F>& upper, Bits<F>& lower) {
  Bits<F> bits = bits_of(x);
  bits = (bits & 0x7fffffffu) > kInfinity ? Bits<F>{} + 0x7fc00000u : bits;
  upper = ((bits + 0x8000u) >> 16) & 0xffffu;
  lower = bits & 0xffffu;
}

// ---- Random bits: element 16 w + 8 h + l of a tile of kRandomTile elements has half h of word w of counter
// 8 tile + l. The step counts up to 2^40 and elements up to 2^37 counters: 13 bits of the step go with the
// latter.

constexpr int kRandomTile = 64;

// Which of an optimizer's random numbers: those of the parameter (slot 0) or of a state (1 and up).
DLFAST_RULE uint32_t random_stream(uint32_t tensor, uint32_t slot) {
  return tensor * (kMaxStates + 1) + slot;
}

// Lane l of V counts 8 tile + lane[l].
template <typename V>
DLFAST_RULE PhiloxBlock<V> random_words(uint64_t seed, uint64_t step, uint32_t stream, uint64_t tile,
                                        V lane) {
  const uint64_t counter = tile * 8;
  const auto high = static_cast<uint32_t>(counter >> 32) | static_cast<uint32_t>(step >> 32) << 16;
  const V zero = {};
  return philox<V>({{lane + static_cast<uint32_t>(counter), zero + high, zero + stream,
                     zero + static_cast<uint32_t>(step)}},
                   static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace dlfast::optim
