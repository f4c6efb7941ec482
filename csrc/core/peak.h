// The most multiply-adds per second of a SIMD level, to compare kernels with.
#pragma once

#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

double multiply_adds(int64_t rounds) {
  constexpr int kChains = 12;  // more than the latency of a multiply-add times how many start in a cycle
  F acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = broadcast<F>(1.0f + static_cast<float>(i));
  const F scale = broadcast<F>(0.999f), step = broadcast<F>(1e-3f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * scale + step;
  }
  F sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum += acc[i];
  volatile float keep = sum[0];  // or the compiler would leave the loop out
  static_cast<void>(keep);
  return 2.0 * kChains * kLanes * static_cast<double>(rounds);
}

}  // namespace dlfast::DLFAST_LEVEL
