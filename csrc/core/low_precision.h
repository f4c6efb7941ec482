// bfloat16 and float16 as storage: vectors of their bits to and from vectors of float.
//
// Integer arithmetic on whole vectors, so that one source serves every SIMD level. Rounding is to nearest,
// ties to even; NaN stays NaN, infinities and subnormals are kept. Include it after the target of the level
// is set (see simd.h). No Torch, no tensors.
#pragma once

#include "core/vec.h"

namespace dlfast {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <int N>
DLFAST_INLINE Vec<float, N> widen(Vec<uint16_t, N> h, BFloat16*) {
  return bits_as<Vec<float, N>>(__builtin_convertvector(h, Vec<uint32_t, N>) << 16);
}

template <int N>
DLFAST_INLINE Vec<uint16_t, N> narrow(Vec<float, N> x, BFloat16*) {
  using U = Vec<uint32_t, N>;
  const U u = bits_as<U>(x);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U quiet_nan = (u >> 16) | 0x40u;  // rounding could carry a NaN into infinity
  return __builtin_convertvector(x != x ? quiet_nan : rounded, Vec<uint16_t, N>);
}

template <int N>
DLFAST_INLINE Vec<float, N> widen(Vec<uint16_t, N> h, Float16*) {
  using U = Vec<uint32_t, N>;
  using F = Vec<float, N>;
  const U u = __builtin_convertvector(h, U);
  const U magnitude = u & 0x7fffu;
  const U normal = (magnitude << 13) + (112u << 23);
  const U infinite = (magnitude << 13) | 0x7f800000u;  // and NaN, with its payload
  const U subnormal = bits_as<U>(__builtin_convertvector(bits_as<Vec<int32_t, N>>(magnitude), F) * 0x1p-24f);
  const U value = magnitude < 0x400u ? subnormal : (magnitude >= 0x7c00u ? infinite : normal);
  return bits_as<F>(value | ((u & 0x8000u) << 16));
}

template <int N>
DLFAST_INLINE Vec<uint16_t, N> narrow(Vec<float, N> x, Float16*) {
  using U = Vec<uint32_t, N>;
  using F = Vec<float, N>;
  const U u = bits_as<U>(x);
  const U magnitude = u & 0x7fffffffu;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5, whose last bit is worth 2^-24 as a subnormal's is, rounds in the adder.
  const U subnormal = bits_as<U>(bits_as<F>(magnitude) + 0.5f) - 0x3f000000u;
  U value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x477ff000u ? U{} + 0x7c00u : value;  // 65520 and above round to infinity
  value = magnitude > 0x7f800000u ? U{} + 0x7e00u : value;
  return __builtin_convertvector(value | ((u >> 16) & 0x8000u), Vec<uint16_t, N>);
}

// N numbers stored as T, as a vector to compute with (float for 16-bit storage, else T itself), and back.
template <typename T>
struct Compute {
  using type = T;
};
template <>
struct Compute<BFloat16> {
  using type = float;
};
template <>
struct Compute<Float16> {
  using type = float;
};

template <typename T, int N>
DLFAST_INLINE Vec<typename Compute<T>::type, N> load_as(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return widen<N>(load<Vec<uint16_t, N>>(p), static_cast<T*>(nullptr));
  } else {
    return load<Vec<T, N>>(p);
  }
}

template <typename T, int N>
DLFAST_INLINE void store_as(T* p, Vec<typename Compute<T>::type, N> x) {
  if constexpr (sizeof(T) == 2) {
    store(p, narrow<N>(x, static_cast<T*>(nullptr)));
  } else {
    store(p, x);
  }
}

}  // namespace dlfast
