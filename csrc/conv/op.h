// The whole block on plain tensors, below autograd.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "conv/algorithm.h"
#include "conv/params.h"
#include "core/checks.h"
#include "core/gradients.h"

namespace dlfast {

// Output and winner mask, of batched input.
std::tuple<at::Tensor, at::Tensor> convolve_block(const at::Tensor& input, const at::Tensor& weight,
                                                  const OptionalTensor& bias, const BlockOptions& options,
                                                  bool save_winner_mask, const ChosenAlgorithms& algorithms);

// Gradients of input, weight and bias; undefined where the mask does not ask for them.
Gradients convolve_block_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                  const at::Tensor& weight, const at::Tensor& winner_mask,
                                  const BlockOptions& options, Mask mask, const ChosenAlgorithms& algorithms);

}  // namespace dlfast
