// What the Python module asks of the operator besides running it.
#pragma once

#include "checks.h"
#include "conv_relu_pool/plan.h"

namespace dlfast {

struct BlockPlan {
  double flops;  // of one convolution: forward, grad_input and grad_weight have as many each
  double floor;  // on CUDA, the least seconds of a forward
  Choice forward, grad_input, grad_weight;
};

// Whether PyTorch's own kernels, forward and, where there will be one, backward, are what the plan of a
// convolution with nothing after it would run anyway.
bool is_plain_convolution(const at::Tensor& input, const at::Tensor& weight, const BlockArgs& block,
                          const PoolArgs& pooling, bool backward);

// The plan of a block for these tensors, batched, with the number of threads set now; mask says which of
// grad_input, grad_weight and grad_bias a backward wants. Raises as the operator.
BlockPlan plan_block(const at::Tensor& input, const at::Tensor& weight, const BlockArgs& block,
                     const PoolArgs& pooling, bool save_code, std::array<bool, 3> mask);

}  // namespace dlfast
