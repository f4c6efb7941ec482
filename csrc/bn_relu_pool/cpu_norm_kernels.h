// Batch normalisation, activation and pooling as one pass, as the CPU offers it to op.cpp.
//
// z [N, C, H, W] is what is normalised, in the layout and of the dtype that p and `dtype` say. Vectors are
// [C], of float, or of double for float64. The code is that of params.h for max pooling, and otherwise null:
// where gradient passes a ReLU is then found again from z.
#pragma once

#include <algorithm>

#include "conv_relu_pool/params.h"
#include "conv_relu_pool/relu_pool.h"

namespace dlfast {

struct NormKernels {
  // Mean and biased variance of each channel. partial holds norm_partials(p) numbers.
  void (*moments)(const ReluPoolParams& p, Dtype dtype, const void* z, double* partial, void* mean,
                  void* var);
  // y = pool(activation(z * scale + shift)) and the code, which may be null where it is not wanted.
  void (*forward)(const ReluPoolParams& p, Dtype dtype, const void* z, const void* scale, const void* shift,
                  void* y, void* code);
  // With g the gradient of z * scale + shift: sum_g = sum of g and sum_gz = sum of g * (z - mean), each [C].
  // For average pooling grad_z is filled with the gradient before the activation, for `backward` to use.
  void (*reduce)(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y, const void* code,
                 const void* scale, const void* shift, const void* mean, double* partial, void* sum_g,
                 void* sum_gz, void* grad_z);
  // grad_z = g * by_g + (z - mean) * by_z + offset; without the last two where by_z and offset are null.
  void (*backward)(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y, const void* code,
                   const void* scale, const void* shift, const void* mean, const void* by_g, const void* by_z,
                   const void* offset, void* grad_z);
};

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
