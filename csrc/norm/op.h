// Batch normalisation, activation and pooling on plain tensors, below autograd.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "core/checks.h"
#include "core/gradients.h"
#include "pool/options.h"

namespace dlfast {

// Rows of the statistics [5, C] that a forward leaves for its backward, of what the dtype computes in.
enum StatisticsRow { kMean, kVariance, kInverse, kScale, kShift, kStatisticsRows };

// What a batch moves on: tensors [C], each of which may be missing.
struct RunningStatistics {
  OptionalTensor mean, var;
  double momentum;
};

// Output, winner mask, statistics. Normalises with `mean` and `var` where they are given, else with those of
// the batch, which then move `running`.
using Normalised = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
Normalised normalise(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps,
                     const PoolOptions& options, bool save_winner_mask, const RunningStatistics& running);

// Gradients of input, weight and bias; undefined where the mask does not ask for them.
Gradients normalise_backward(const at::Tensor& grad_output, const at::Tensor& input,
                             const OptionalTensor& weight, const at::Tensor& statistics,
                             const at::Tensor& winner_mask, bool batch_statistics, const PoolOptions& options,
                             Mask mask);

}  // namespace dlfast
