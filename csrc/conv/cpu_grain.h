// How the work of the CPU kernels is cut into units.
#pragma once

#include "conv/cpu/kernels.h"

namespace dlfast {

// Pooled rows in a unit of work, where a convolution row costs `floats_per_conv_row` of workspace: as many as
// stay in cache, but few enough that every thread has several units.
int64_t forward_grain(const ConvBlockParams& p, double floats_per_conv_row, int64_t threads);
int64_t grad_input_grain(const ConvBlockParams& p, int64_t threads);
int64_t grad_weight_grain(const ConvBlockParams& p, GradWeightKernel kernel, int64_t threads);

}  // namespace dlfast
