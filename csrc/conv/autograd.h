// The whole operator of convolution, activation and pooling as Python calls it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "conv/options.h"
#include "core/checks.h"

namespace dlfast {

// The operator conv_relu_pool2d without the dispatcher, below autocast too. Not there where the tensors are not
// plain (core/plain.h): that is for the dispatcher.
std::optional<at::Tensor> conv_relu_pool2d_plain(const at::Tensor& input, const at::Tensor& weight,
                                                 const OptionalTensor& bias, const PublicOptions& options);

}  // namespace dlfast
