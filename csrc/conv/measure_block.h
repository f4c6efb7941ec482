// PyTorch's kernels one by one in place of a whole block, where they were measured to be faster.
#pragma once

#include "conv/options.h"
#include "core/checks.h"

#ifdef DLFAST_WITH_CUDA
#include <functional>

namespace dlfast {

// Seconds of a forward and, where there will be one, a backward.
struct BlockSeconds {
  double ours, eager;
};

// What was measured for a block, if anything was and PyTorch is set to go by it.
std::optional<BlockSeconds> measured_block(const at::Tensor& input, const at::Tensor& weight,
                                           const OptionalTensor& bias, const BlockOptions& options,
                                           bool backward);

// Whether eager_block is faster than `ours`, both measured when the block is first met with PyTorch set to
// measure.
using BlockFunction =
    std::function<at::Tensor(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias)>;
bool eager_is_faster(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                     const BlockOptions& options, bool backward, const BlockFunction& ours);

}  // namespace dlfast
#endif
