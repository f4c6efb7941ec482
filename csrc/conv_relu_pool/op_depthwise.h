// Depthwise convolutions on CPU tensors, for op.cpp: allocates scratch and calls the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "conv_relu_pool/cpu_kernels.h"

namespace dlfast {

// All tensors are what depthwise_fits accepts; what is written is allocated and in the layout of the pool.
void depthwise_forward(const ConvBlockParams& p, Dtype dtype, const at::Tensor& input,
                       const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::Tensor& output);

// grad_z is channels_last, and zero where ReLU passes nothing.
void depthwise_grad_input(const ConvBlockParams& p, Dtype dtype, const at::Tensor& grad_z,
                          const at::Tensor& weight, at::Tensor& grad_input);
// grad_weight is contiguous; an undefined grad_bias is not wanted.
void depthwise_grad_weight(const ConvBlockParams& p, Dtype dtype, const at::Tensor& grad_z,
                           const at::Tensor& input, at::Tensor& grad_weight, const at::Tensor& grad_bias);

}  // namespace dlfast
