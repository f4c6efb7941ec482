// The algorithms of the CPU, as op.cpp calls them on tensors it has checked. An algorithm takes the problem,
// or it would not have been chosen.
//
// What is not there in a result is not finite: infinities and NaN meet zeros that our kernels skip, and
// Winograd's sums overflow earlier than true ones. Only PyTorch's kernels tell then what the result is.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "conv/algorithm.h"
#include "conv/params.h"
#include "core/checks.h"

namespace dlfast {

using OptionalForward = std::optional<std::tuple<at::Tensor, at::Tensor>>;  // output, winner_mask

OptionalForward cpu_forward(const ConvBlockParams& p, Dtype dtype, Algorithm algorithm,
                            const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            bool save_winner_mask);

// What the sparse kernels read, see cpu/kernels.h; winner_mask is undefined without pooling.
struct SparseGradient {
  at::Tensor grad, winner_mask;

  const uint8_t* who() const {
    return winner_mask.defined() ? winner_mask.const_data_ptr<uint8_t>() : nullptr;
  }
};

// The gradients of a block by our kernels, from what both of them need.
class CpuGradient {
 public:
  CpuGradient(const ConvBlockParams& p, Dtype dtype, const at::Tensor& grad_output,
              const at::Tensor& winner_mask);

  // grad_weight, contiguous, and grad_bias, which is no result unless it is needed.
  std::optional<std::tuple<at::Tensor, at::Tensor>> weight(Algorithm algorithm, const at::Tensor& input,
                                                           const at::Tensor& weight, bool needs_bias) const;
  std::optional<at::Tensor> input(Algorithm algorithm, const at::Tensor& input,
                                  const at::Tensor& weight) const;

 private:
  const ConvBlockParams& p_;
  Dtype dtype_;
  SparseGradient gradient_;
};

}  // namespace dlfast
