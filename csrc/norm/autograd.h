// The whole operator of batch normalisation as Python calls it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "norm/op.h"

namespace dlfast {

// As torch.nn.functional.batch_norm, then activation and pooling. Not there where the tensors are none that it
// takes or are not plain (core/plain.h): that is for the dispatcher and for PyTorch.
std::optional<at::Tensor> batch_norm_relu_pool2d(const at::Tensor& input, const OptionalTensor& running_mean,
                                                 const OptionalTensor& running_var,
                                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                                 bool training, double momentum, double eps,
                                                 const PoolOptions& options);

}  // namespace dlfast
