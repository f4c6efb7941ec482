// The single kernels of convolution blocks on CUDA, as op.cpp calls it on tensors it has checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "conv/cuda/kernels.h"
#include "core/checks.h"
#include "core/gradients.h"

namespace dlfast {

// What decides how the products of a block are computed: the device and PyTorch's settings.
MathMode cuda_math_mode(Dtype dtype, const CudaDevice& device);

// Fills output and winner_mask, which may be empty.
void single_forward(const CudaConv& c, const at::Tensor& input, const at::Tensor& weight,
                    const OptionalTensor& bias, at::Tensor& output, at::Tensor& winner_mask);

// grad_input, channels_last.
at::Tensor single_grad_input(const CudaConv& c, const at::Tensor& input, const at::Tensor& weight,
                             const at::Tensor& grad_output, const at::Tensor& winner_mask);

// grad_weight, channels_last, and grad_bias.
std::tuple<at::Tensor, at::Tensor> single_grad_weight(const CudaConv& c, const at::Tensor& input,
                                                      const at::Tensor& weight, const at::Tensor& grad_output,
                                                      const at::Tensor& winner_mask);

// grad_bias of a block on CUDA: from the gradient of its output, or with average pooling from the dense one.
at::Tensor cuda_grad_bias(const ReluPoolParams& p, Dtype dtype, const at::Tensor& grad,
                          const at::Tensor& winner_mask);

// The parts of a backward by each algorithm, each of which computes and throws away. The dense ones follow
// `expand`.
struct BackwardTrials {
  std::function<void()> expand, dense_input, dense_weight, own_input, own_weight;
};

// Where PyTorch is set to measure, measures what the choice then goes by; once per problem.
void measure_forward(const CudaConv& c, bool save_winner_mask, const at::Tensor& input,
                     const std::function<void()>& epilogue, const std::function<void()>& single);
void measure_backward(const CudaConv& c, const at::Tensor& input, Mask mask, const BackwardTrials& trials);

}  // namespace dlfast
