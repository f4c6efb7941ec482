// What a normalisation computes of the vectors [C] between its passes, one channel at a time, for every
// backend. Acc is float, or double for float64.
#pragma once

#include <cmath>

#include "core/portability.h"

namespace dlfast {

// 1 / standard deviation, and the scale and shift that stand for the whole normalisation.
template <typename Acc>
struct TransformVectors {
  int64_t channels;
  double eps;
  const Acc *weight, *bias;  // may be null
  const Acc *mean, *var;
  Acc *inverse, *scale, *shift;

  DLFAST_HOST_DEVICE void run(int64_t c) const {
    const Acc one_over = Acc(1) / std::sqrt(var[c] + static_cast<Acc>(eps));
    const Acc by = weight == nullptr ? one_over : one_over * weight[c];
    inverse[c] = one_over;
    scale[c] = by;
    shift[c] = (bias == nullptr ? Acc(0) : bias[c]) - mean[c] * by;
  }
};

// From the sums of g and of g * (z - mean): grad_weight, and where the statistics are the batch's own, what
// the gradient of z has beside g * scale (see norm.h).
template <typename Acc>
struct GradientVectors {
  int64_t channels;
  double count;  // elements of a channel
  const Acc *inverse, *scale, *sum_g, *sum_gz;
  Acc* grad_weight;
  Acc *by_z, *offset;  // null where the statistics are fixed

  DLFAST_HOST_DEVICE void run(int64_t c) const {
    grad_weight[c] = sum_gz[c] * inverse[c];
    if (by_z == nullptr) return;
    const Acc share = static_cast<Acc>(-1 / count);
    by_z[c] = scale[c] * inverse[c] * grad_weight[c] * share;
    offset[c] = scale[c] * sum_g[c] * share;
  }
};

}  // namespace dlfast
