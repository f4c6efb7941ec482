// The single-kernel way of convolution blocks on CUDA, as op.cpp calls it on tensors it has checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>

#include "conv_relu_pool/conv_cuda.h"

namespace dlfast {

// What decides how the products of a block are computed: the device and PyTorch's settings.
Products cuda_products(Dtype dtype, const CudaDevice& device);

// Fills output and code, which may be empty.
void single_forward(const CudaConv& c, const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, at::Tensor& output, at::Tensor& code);

// grad_input, channels_last.
at::Tensor single_grad_input(const CudaConv& c, const at::Tensor& input, const at::Tensor& weight,
                             const at::Tensor& grad_output, const at::Tensor& code);

// grad_weight, channels_last, and grad_bias.
std::tuple<at::Tensor, at::Tensor> single_grad_weight(const CudaConv& c, const at::Tensor& input,
                                                      const at::Tensor& weight, const at::Tensor& grad_output,
                                                      const at::Tensor& code);

// grad_bias of a block on CUDA: from the gradient of its output, or with average pooling from the dense one.
at::Tensor cuda_grad_bias(const ReluPoolParams& p, Dtype dtype, const at::Tensor& grad,
                          const at::Tensor& code);

// The ways of a backward, each of which computes and throws away. The dense ones follow `expand`.
struct BackwardWays {
  std::function<void()> expand, dense_input, dense_weight, own_input, own_weight;
};

// Where PyTorch is set to measure, measures what the planner then goes by; once per problem.
void measure_forward(const CudaConv& c, bool save_code, const at::Tensor& input,
                     const std::function<void()>& epilogue, const std::function<void()>& single);
void measure_backward(const CudaConv& c, const at::Tensor& input, std::array<bool, 3> mask,
                      const BackwardWays& ways);

}  // namespace dlfast
