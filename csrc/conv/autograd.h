// The whole operator of convolution, activation and pooling as Python calls it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "conv/algorithm.h"
#include "conv/options.h"
#include "core/checks.h"
#include "core/gradients.h"

namespace dlfast {

// Gradients of input, weight and bias, recorded in turn where somebody asks for that; undefined where the
// mask does not ask for them.
Gradients conv_gradients(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                         const at::Tensor& winner_mask, const BlockOptions& options, Mask mask,
                         const ChosenAlgorithms& algorithms);

// The operator conv_relu_pool2d without the dispatcher, below autocast too. Not there where the tensors are
// not plain (core/plain.h): that is for the dispatcher.
std::optional<at::Tensor> conv_relu_pool2d_plain(const at::Tensor& input, const at::Tensor& weight,
                                                 const OptionalTensor& bias, const PublicOptions& options);

}  // namespace dlfast
