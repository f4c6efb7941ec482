// Convolution, batch normalisation, activation and pooling in training, as one operator with one node.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "conv/params.h"
#include "core/checks.h"
#include "pool/params.h"

namespace dlfast {

// The tensors of a chain; what is missing is empty.
struct ConvNormTensors {
  const at::Tensor& input;
  const at::Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& norm_weight;
  const OptionalTensor& norm_bias;
};

struct ConvNormOptions {
  ConvOptions conv;
  PoolOptions pool;  // and activation
};

// Normalises with the statistics of the batch, which move the running ones. Not there where the tensors are
// none that it takes or are not plain (core/plain.h): the parts one by one are for these.
std::optional<at::Tensor> conv_norm_pool2d(const ConvNormTensors& tensors, double momentum, double eps,
                                           const ConvNormOptions& options);

}  // namespace dlfast
