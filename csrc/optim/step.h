// The update rules: pure functions over registers, the same source for every SIMD level and for CUDA.
//
// A rule says how many states it keeps, what of a step is constant over a tensor (`prepare`, once per
// tensor) and how one element, or one vector of elements, changes (`update`). It knows nothing of memory,
// chunks or threads. To add an algorithm: a group of hyper-parameters in params.h, a rule here, and its
// name in the lists of cpu_body.h, cpu_step.cpp, launch.cu and op.cpp.
//
// V is float or double, or a vector of them; T is the scalar. Standard library only.
#pragma once

#include <cmath>
#include <type_traits>

#include "optim/params.h"

#if defined(__CUDACC__)
#define DLFAST_RULE __host__ __device__ __forceinline__
#else
#define DLFAST_RULE inline __attribute__((always_inline))
#endif

namespace dlfast::optim {

template <typename V>
DLFAST_RULE V square_root(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return std::sqrt(x);
  } else {
    // One instruction: compiled with -fno-math-errno.
    for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
    return x;
  }
}

// NaN wins, as in torch.maximum.
template <typename V>
DLFAST_RULE V maximum(V a, V b) {
  return ((a > b) | (a != a)) ? a : b;
}

// `step` below is the number of this step: 1 for the first. `grad_factor` is 1 over GradScaler's scale.

// States: momentum_buffer, absent where momentum is 0.
struct Sgd {
  using Group = SgdGroup;
  static constexpr int kMinStates = 0;
  static constexpr int kMaxStates = 1;

  template <typename T>
  struct Constants {
    T lr, grad_factor, weight_decay, momentum;
    T buffer_decay, buffer_gain;  // buffer <- decay * buffer + gain * gradient
    bool nesterov;
  };

  template <typename T>
  static DLFAST_RULE Constants<T> prepare(const SgdGroup& group, double lr, double step, double grad_factor) {
    // The first gradient enters the buffer undamped. Buffers start as zeros.
    const bool first = step <= 1;
    Constants<T> c;
    c.lr = static_cast<T>(lr);
    c.grad_factor = static_cast<T>(group.maximize ? -grad_factor : grad_factor);
    c.weight_decay = static_cast<T>(group.weight_decay);
    c.momentum = static_cast<T>(group.momentum);
    c.buffer_decay = static_cast<T>(first ? 0 : group.momentum);
    c.buffer_gain = static_cast<T>(first ? 1 : 1 - group.dampening);
    c.nesterov = group.nesterov;
    return c;
  }

  template <int states, typename V, typename T>
  static DLFAST_RULE void update(V& param, V grad, V* state, const Constants<T>& c) {
    grad = grad * c.grad_factor;
    if (c.weight_decay != 0) grad = grad + param * c.weight_decay;
    if constexpr (states == 1) {
      state[0] = state[0] * c.buffer_decay + grad * c.buffer_gain;
      grad = c.nesterov ? grad + state[0] * c.momentum : state[0];
    }
    param = param - grad * c.lr;
  }
};

// States: exp_avg, exp_avg_sq, and max_exp_avg_sq with amsgrad. AdamW is decoupled_weight_decay.
struct Adam {
  using Group = AdamGroup;
  static constexpr int kMinStates = 2;
  static constexpr int kMaxStates = 3;

  template <typename T>
  struct Constants {
    T grad_factor, weight_decay, param_factor, beta1, gain1, beta2, gain2, step_size, inv_sqrt_correction2,
        eps;
  };

  template <typename T>
  static DLFAST_RULE Constants<T> prepare(const AdamGroup& group, double lr, double step,
                                          double grad_factor) {
    const bool decoupled = group.decoupled_weight_decay;
    Constants<T> c;
    c.grad_factor = static_cast<T>(group.maximize ? -grad_factor : grad_factor);
    c.weight_decay = static_cast<T>(decoupled ? 0 : group.weight_decay);
    c.param_factor = static_cast<T>(decoupled ? 1 - lr * group.weight_decay : 1);
    c.beta1 = static_cast<T>(group.beta1);
    c.gain1 = static_cast<T>(1 - group.beta1);
    c.beta2 = static_cast<T>(group.beta2);
    c.gain2 = static_cast<T>(1 - group.beta2);
    c.step_size = static_cast<T>(lr / (1 - std::pow(group.beta1, step)));
    c.inv_sqrt_correction2 = static_cast<T>(1 / std::sqrt(1 - std::pow(group.beta2, step)));
    c.eps = static_cast<T>(group.eps);
    return c;
  }

  template <int states, typename V, typename T>
  static DLFAST_RULE void update(V& param, V grad, V* state, const Constants<T>& c) {
    grad = grad * c.grad_factor;
    if (c.weight_decay != 0) grad = grad + param * c.weight_decay;
    // Not m + gain * (g - m), which loses a small gradient beside a large moment when beta1 is near 0.
    state[0] = state[0] * c.beta1 + grad * c.gain1;
    state[1] = state[1] * c.beta2 + grad * grad * c.gain2;
    V second = state[1];
    if constexpr (states == 3) second = state[2] = maximum(state[2], state[1]);
    const V denominator = square_root(second) * c.inv_sqrt_correction2 + c.eps;
    param = param * c.param_factor - state[0] * c.step_size / denominator;
  }
};

}  // namespace dlfast::optim
