// Which way a block is computed, and why: the one place for it.
#pragma once

#include "conv_relu_pool/cpu_kernels.h"

namespace dlfast {

enum class ForwardPath {
  epilogue,   // PyTorch's convolution, then one pass of ours over its output
  direct,     // our kernels, the convolution output is never written
  winograd2,  // the same by Winograd's method, in tiles of 2x2
  winograd4,  // in tiles of 4x4
};

enum class GradientPath {
  pytorch,  // one pass of ours expands the gradient, then PyTorch's convolution_backward
  sparse,   // our kernels, what passes no gradient is skipped
  patches,  // the same for few input channels, grad_weight only
};

// DLFAST_PLAN=direct, winograd2 or winograd4 takes our kernels wherever they accept the problem, even where
// they are slower, and DLFAST_PLAN=epilogue never takes them; all are for tests and measurements.
ForwardPath plan_forward(const ConvBlockParams& p, Dtype dtype, bool cpu, bool save_code);
GradientPath plan_grad_weight(const ConvBlockParams& p, Dtype dtype, bool cpu);  // and grad_bias
GradientPath plan_grad_input(const ConvBlockParams& p, Dtype dtype, bool cpu);

// Pooled rows in a unit of work, where a convolution row costs `floats_per_conv_row` of scratch: as many as
// stay in cache, but few enough that every thread has several units.
int64_t plan_grain(const ConvBlockParams& p, double floats_per_conv_row, int64_t threads);

}  // namespace dlfast
