// Batch normalisation, activation and pooling as one pass, as each backend offers it to op.cpp.
//
// z [N, C, H, W] is what is normalised, in the layout and of the dtype that p and `dtype` say. Vectors are
// [C], of float, or of double for float64. The winner mask is that of params.h for max pooling, and otherwise
// null: where gradient passes a ReLU is then found again from z. `vectors` is a TransformVectors or a
// GradientVectors of what the dtype computes in. `stream` is a cudaStream_t, which the CPU ignores.
#pragma once

#include "norm/vectors.h"
#include "pool/kernels.h"
#include "pool/params.h"

namespace dlfast {

struct NormKernels {
  // Mean and biased variance of each channel, and what vectors (TransformVectors) make of them. partial holds
  // as many numbers as the backend says.
  void (*moments)(const ReluPoolParams& p, Dtype dtype, const void* z, double* partial, const void* vectors,
                  void* stream);
  // y = pool(activation(z * scale + shift)) and the winner mask, which may be null where it is not wanted.
  void (*forward)(const ReluPoolParams& p, Dtype dtype, const void* z, const void* scale, const void* shift,
                  void* y, void* winner_mask, void* stream);
  // With g the gradient of z * scale + shift: sum_g = sum of g and sum_gz = sum of g * (z - mean), each [C],
  // and what vectors (GradientVectors) make of them. For average pooling grad_z is filled with the gradient
  // before the activation, for `backward` to use.
  void (*reduce)(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y,
                 const void* winner_mask, const void* scale, const void* shift, const void* mean,
                 double* partial, const void* vectors, void* grad_z, void* stream);
  // grad_z = g * scale + (z - mean) * by_z + offset; without the last two where by_z and offset are null.
  void (*backward)(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y,
                   const void* winner_mask, const void* scale, const void* shift, const void* mean,
                   const void* by_z, const void* offset, void* grad_z, void* stream);
};

const NormKernels& norm_cpu();  // of the SIMD level in use; it ignores the stream
#ifdef DLFAST_WITH_CUDA
const NormKernels& norm_cuda();
int64_t norm_partials_cuda(const ReluPoolParams& p);  // numbers in `partial`
// vectors.run() for every channel.
template <typename Vectors>
void norm_vectors_cuda(const Vectors& vectors, void* stream);
#endif

}  // namespace dlfast
