// Which way a block is computed, and why: the one place for it.
//
//   direct    our kernels, the convolution output is never written
//   epilogue  PyTorch's convolution, then one pass of ours over its output
//
// DLFAST_PLAN=direct takes our kernels wherever they accept the problem, even where they are slower, and
// DLFAST_PLAN=epilogue never takes them; both are for tests and measurements.
#pragma once

#include "conv_relu_pool/cpu_kernels.h"

namespace dlfast {

enum class Path { direct, epilogue };

Path plan_forward(const ConvBlockParams& p, Dtype dtype, bool cpu, bool save_code);

// Of grad_weight and grad_bias; grad_input always takes the epilogue's way.
Path plan_grad_weight(const ConvBlockParams& p, Dtype dtype, bool cpu);

// Pooled rows in a band (cpu_band.h), where a convolution row under the band costs `floats_per_conv_row` of
// scratch: as many as stay in cache, but few enough that every thread has several bands.
int64_t plan_band(const ConvBlockParams& p, double floats_per_conv_row, int64_t threads);

}  // namespace dlfast
