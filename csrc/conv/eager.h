// A block by PyTorch's kernels one by one, under their own autograd.
#pragma once

#include "conv/options.h"
#include "core/checks.h"

namespace dlfast {

at::Tensor eager_block(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                       const BlockOptions& options);

}  // namespace dlfast
