// The single-kernel way of convolution blocks on CUDA, as op.cpp calls it on tensors it has checked.
#pragma once

#include <ATen/core/Tensor.h>

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

// grad_weight in the layout of weight, and grad_bias.
std::tuple<at::Tensor, at::Tensor> single_grad_weight(const CudaConv& c, const at::Tensor& input,
                                                      const at::Tensor& weight, const at::Tensor& grad_output,
                                                      const at::Tensor& code);

}  // namespace dlfast
