// How much workspace the CPU's normalisation needs, see norm.h.
#pragma once

#include <algorithm>

#include "norm/kernels.h"

namespace dlfast {

// Sums are taken over slices and then added, in an order that does not depend on the number of threads: an
// image of one channel is a slice of a contiguous tensor, a run of pixels one of a channels_last tensor.
constexpr int64_t kSliceElements = 32 * 1024;

inline int64_t slice_pixels(const ReluPoolParams& p) {
  return std::clamp<int64_t>(kSliceElements / std::max<int64_t>(1, p.channels), 16, 1024);
}

inline int64_t norm_slices(const ReluPoolParams& p) {
  const int64_t pixels = p.batch * p.input_size[0] * p.input_size[1], run = slice_pixels(p);
  return p.channels_last ? (pixels + run - 1) / run : p.batch;
}

// And one more for their sum.
inline int64_t norm_partials(const ReluPoolParams& p) {
  return 2 * p.channels * (norm_slices(p) + 1);
}

}  // namespace dlfast
