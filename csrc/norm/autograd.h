// The whole operator of batch normalisation as Python calls it.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <initializer_list>
#include <optional>

#include "norm/op.h"

namespace dlfast {

// Gradients of input, weight and bias, recorded in turn where somebody asks for that; undefined where the
// mask does not ask for them.
Gradients norm_gradients(const at::Tensor& grad, const at::Tensor& input, const OptionalTensor& weight,
                         const at::Tensor& statistics, const at::Tensor& winner_mask, bool batch_statistics,
                         double eps, const PoolOptions& options, Mask mask);

// Whether the operator takes vectors like these for an input of that dtype, channels and device; else PyTorch
// computes it, or refuses.
bool takes_normalisation(at::ScalarType dtype, int64_t channels, c10::Device device,
                         std::initializer_list<std::reference_wrapper<const OptionalTensor>> vectors);

// A batch of one number has no variance.
void check_batch(const at::Tensor& input);

// As torch.nn.functional.batch_norm, then activation and pooling. Not there where the tensors are none that
// it takes or are not plain (core/plain.h): that is for the dispatcher and for PyTorch.
std::optional<at::Tensor> batch_norm_relu_pool2d(const at::Tensor& input, const OptionalTensor& running_mean,
                                                 const OptionalTensor& running_var,
                                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                                 bool training, double momentum, double eps,
                                                 const PoolOptions& options);

}  // namespace dlfast
