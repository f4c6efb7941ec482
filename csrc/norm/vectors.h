// What a normalisation computes of the vectors [C] between its passes, one channel at a time, for every
// backend. Acc is float, or double for float64.
#pragma once

#include <cmath>

#include "core/portability.h"

namespace dlfast {

// 1 / standard deviation, and the scale and shift that stand for the whole normalisation. Of a batch also
// what the running statistics become.
template <typename Acc_>
struct TransformVectors {
  using Acc = Acc_;
  int64_t channels;
  double eps;
  const Acc *weight, *bias;           // may be null
  const Acc *fixed_mean, *fixed_var;  // null where they are those of a batch, which set() then tells
  Acc *mean, *var;
  Acc *inverse, *scale, *shift;
  Acc *running_mean, *running_var;  // may be null
  double momentum, unbiased;        // unbiased: what makes the variance of the batch an unbiased one

  DLFAST_HOST_DEVICE void set(int64_t c, double batch_mean, double batch_var) const {
    mean[c] = static_cast<Acc>(batch_mean);
    var[c] = static_cast<Acc>(batch_var);
  }

  DLFAST_HOST_DEVICE void run(int64_t c) const {
    if (fixed_mean != nullptr) set(c, fixed_mean[c], fixed_var[c]);
    move(running_mean, c, mean[c], momentum);
    move(running_var, c, var[c], momentum * unbiased);
    const Acc one_over = Acc(1) / std::sqrt(var[c] + static_cast<Acc>(eps));
    const Acc by = weight == nullptr ? one_over : one_over * weight[c];
    inverse[c] = one_over;
    scale[c] = by;
    shift[c] = (bias == nullptr ? Acc(0) : bias[c]) - mean[c] * by;
  }

 private:
  DLFAST_HOST_DEVICE void move(Acc* running, int64_t c, Acc batch, double share) const {
    if (running == nullptr) return;
    running[c] = running[c] * static_cast<Acc>(1 - momentum) + batch * static_cast<Acc>(share);
  }
};

// From the sums of g and of g * (z - mean): grad_weight, and where the statistics are the batch's own, what
// the gradient of z has beside g * scale (see norm.h).
template <typename Acc_>
struct GradientVectors {
  using Acc = Acc_;
  int64_t channels;
  double count;  // elements of a channel
  const Acc *inverse, *scale;
  Acc *sum_g, *sum_gz;  // what run() reads
  Acc* grad_weight;
  Acc *by_z, *offset;  // null where the statistics are fixed

  DLFAST_HOST_DEVICE void set(int64_t c, double g, double gz) const {
    sum_g[c] = static_cast<Acc>(g);
    sum_gz[c] = static_cast<Acc>(gz);
  }

  DLFAST_HOST_DEVICE void run(int64_t c) const {
    grad_weight[c] = sum_gz[c] * inverse[c];
    if (by_z == nullptr) return;
    const Acc share = static_cast<Acc>(-1 / count);
    by_z[c] = scale[c] * inverse[c] * grad_weight[c] * share;
    offset[c] = scale[c] * sum_g[c] * share;
  }
};

}  // namespace dlfast
