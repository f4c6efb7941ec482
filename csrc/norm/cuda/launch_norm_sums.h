// The sums per channel of a normalisation on CUDA: moments and reduce of norm.h.
#pragma once

#include "norm/kernels.h"

namespace dlfast {

void norm_moments_cuda(const ReluPoolParams& p, Dtype dtype, const void* z, double* partial,
                       const void* vectors, void* stream);
void norm_reduce_cuda(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y,
                      const void* winner_mask, const void* scale, const void* shift, const void* mean,
                      double* partial, const void* vectors, void* grad_z, void* stream);

}  // namespace dlfast
