// What every CPU body stands on: the vectors of one SIMD level, as DLFAST_LEVEL (its name) and DLFAST_LANES
// (floats in a register) say. simd/<level>.cpp defines them, and sets the compiler's target before it
// includes this and the bodies; a body that is compiled or read by itself is portable.
#pragma once

#include "core/cpu_prelude.h"

#ifndef DLFAST_LEVEL
#define DLFAST_LEVEL portable
#define DLFAST_LANES 4
#endif

#include "core/vec.h"

namespace dlfast::DLFAST_LEVEL {

constexpr int kLanes = DLFAST_LANES;
using F = Vec<float, kLanes>;

// Elements below which starting another thread does not pay; ATen uses the same number.
constexpr int64_t kGrain = 32768;

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// N numbers of T as numbers one computes with, and back, rounded once.
template <int N, typename T>
DLFAST_INLINE Vec<Compute<T>, N> load_compute(const T* p) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    return load<Vec<T, N>>(p);
  } else {
    float wide[N];
    for (int i = 0; i < N; ++i) wide[i] = static_cast<float>(p[i]);
    return load<Vec<float, N>>(wide);
  }
}

template <int N, typename T>
DLFAST_INLINE void store_compute(T* p, Vec<Compute<T>, N> v) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    store(p, v);
  } else {
    float wide[N];
    store(wide, v);
    for (int i = 0; i < N; ++i) p[i] = static_cast<T>(wide[i]);
  }
}

}  // namespace dlfast::DLFAST_LEVEL
