// The update rules: pure functions over registers, the same source for every SIMD level and for CUDA.
//
// A rule says which hyper-parameters a group carries (`Group`: doubles, in the order in which
// dlfast/optim/<algorithm>.py lists them), how many states it keeps, what of a step is constant over a tensor
// (`prepare`, once per tensor) and how one element, or one vector of elements, changes (`update`). It knows
// nothing of memory, number formats, chunks or threads. docs/optimizers.md adds one as an example.
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

// 1, -1 or 0; 0 for NaN, as torch.sign.
template <typename V>
DLFAST_RULE V sign(V x) {
  const V one = V{} + 1.0f;
  return x > 0 ? one : (x < 0 ? -one : V{});
}

// What clipping to `max_norm` multiplies gradients of this norm by, as torch.nn.utils.clip_grad_norm_.
DLFAST_RULE double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 ? 1 : factor;  // NaN stays
}

// What decoupled weight decay multiplies a parameter by. Without decay it is 1, whatever the learning rate:
// an infinite one times 0 is NaN.
DLFAST_RULE double decay_factor(double lr, double weight_decay) {
  return weight_decay != 0 ? 1 - lr * weight_decay : 1;
}

// What `prepare` takes beside the group. `step` is the number of this step: 1 for the first. `grad_factor`
// multiplies the gradient: unscaling and clipping. `trust` is for rules that measure (Lamb).
struct StepFacts {
  double step;
  double grad_factor;
  double trust;
};

// States: momentum_buffer, absent where momentum is 0.
struct Sgd {
  static constexpr int kMinStates = 0;
  static constexpr int kMaxStates = 1;
  static constexpr bool kMeasures = false;

  struct Group {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };

  template <typename T>
  struct Constants {
    T lr, grad_factor, weight_decay, momentum;
    T buffer_decay, buffer_gain;  // buffer <- decay * buffer + gain * gradient
    bool nesterov;
  };

  template <typename T>
  static DLFAST_RULE Constants<T> prepare(const Group& group, const StepFacts& facts) {
    // The first gradient enters the buffer undamped. Buffers start as zeros.
    const bool first = facts.step <= 1;
    Constants<T> c;
    c.lr = static_cast<T>(group.lr);
    c.grad_factor = static_cast<T>(group.maximize != 0 ? -facts.grad_factor : facts.grad_factor);
    c.weight_decay = static_cast<T>(group.weight_decay);
    c.momentum = static_cast<T>(group.momentum);
    c.buffer_decay = static_cast<T>(first ? 0 : group.momentum);
    c.buffer_gain = static_cast<T>(first ? 1 : 1 - group.dampening);
    c.nesterov = group.nesterov != 0;
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
  static constexpr int kMinStates = 2;
  static constexpr int kMaxStates = 3;
  static constexpr bool kMeasures = false;

  struct Group {
    double lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize;
  };

  template <typename T>
  struct Constants {
    T grad_factor, weight_decay, param_factor, beta1, gain1, beta2, gain2, step_size, inv_sqrt_correction2,
        eps;
  };

  template <typename T>
  static DLFAST_RULE Constants<T> prepare(const Group& group, const StepFacts& facts) {
    const bool decoupled = group.decoupled_weight_decay != 0;
    Constants<T> c;
    c.grad_factor = static_cast<T>(group.maximize != 0 ? -facts.grad_factor : facts.grad_factor);
    c.weight_decay = static_cast<T>(decoupled ? 0 : group.weight_decay);
    c.param_factor = static_cast<T>(decoupled ? decay_factor(group.lr, group.weight_decay) : 1);
    c.beta1 = static_cast<T>(group.beta1);
    c.gain1 = static_cast<T>(1 - group.beta1);
    c.beta2 = static_cast<T>(group.beta2);
    c.gain2 = static_cast<T>(1 - group.beta2);
    c.step_size = static_cast<T>(group.lr / (1 - std::pow(group.beta1, facts.step)));
    c.inv_sqrt_correction2 = static_cast<T>(1 / std::sqrt(1 - std::pow(group.beta2, facts.step)));
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

// State: exp_avg.
struct Lion {
  static constexpr int kMinStates = 1;
  static constexpr int kMaxStates = 1;
  static constexpr bool kMeasures = false;

  struct Group {
    double lr, beta1, beta2, weight_decay, maximize;
  };

  template <typename T>
  struct Constants {
    T grad_factor, param_factor, lr, beta1, gain1, beta2, gain2;
  };

  template <typename T>
  static DLFAST_RULE Constants<T> prepare(const Group& group, const StepFacts& facts) {
    Constants<T> c;
    c.grad_factor = static_cast<T>(group.maximize != 0 ? -facts.grad_factor : facts.grad_factor);
    c.param_factor = static_cast<T>(decay_factor(group.lr, group.weight_decay));
    c.lr = static_cast<T>(group.lr);
    c.beta1 = static_cast<T>(group.beta1);
    c.gain1 = static_cast<T>(1 - group.beta1);
    c.beta2 = static_cast<T>(group.beta2);
    c.gain2 = static_cast<T>(1 - group.beta2);
    return c;
  }

  template <int states, typename V, typename T>
  static DLFAST_RULE void update(V& param, V grad, V* state, const Constants<T>& c) {
    grad = grad * c.grad_factor;
    const V direction = state[0] * c.beta1 + grad * c.gain1;
    param = param * c.param_factor - sign(direction) * c.lr;
    state[0] = state[0] * c.beta2 + grad * c.gain2;
  }
};

// States: square_avg, grad_avg where centered, momentum_buffer where momentum is not 0; in this order.
struct RmsProp {
  static constexpr int kMinStates = 1;
  static constexpr int kMaxStates = 3;
  static constexpr bool kMeasures = false;

  struct Group {
    double lr, alpha, eps, weight_decay, momentum, centered, maximize;
  };

  template <typename T>
  struct Constants {
    T grad_factor, lr, alpha, gain, eps, weight_decay, momentum;
    bool centered;
  };

  template <typename T>
  static DLFAST_RULE Constants<T> prepare(const Group& group, const StepFacts& facts) {
    Constants<T> c;
    c.grad_factor = static_cast<T>(group.maximize != 0 ? -facts.grad_factor : facts.grad_factor);
    c.lr = static_cast<T>(group.lr);
    c.alpha = static_cast<T>(group.alpha);
    c.gain = static_cast<T>(1 - group.alpha);
    c.eps = static_cast<T>(group.eps);
    c.weight_decay = static_cast<T>(group.weight_decay);
    // One that only the device knows may be below 0: none, as in torch.optim.
    c.momentum = static_cast<T>(group.momentum > 0 ? group.momentum : 0);
    c.centered = group.centered != 0;
    return c;
  }

  template <int states, typename V, typename T>
  static DLFAST_RULE void update(V& param, V grad, V* state, const Constants<T>& c) {
    grad = grad * c.grad_factor;
    if (c.weight_decay != 0) grad = grad + param * c.weight_decay;
    state[0] = state[0] * c.alpha + grad * grad * c.gain;
    V second = state[0];
    const bool centered = states == 3 || (states == 2 && c.centered);
    if (centered) {
      V& average = state[states > 1 ? 1 : 0];
      average = average * c.alpha + grad * c.gain;
      // A variance: rounding, of quantised states above all, must not make it negative.
      second = maximum(second - average * average, V{});
    }
    grad = grad / (square_root(second) + c.eps);
    if (states - 1 - centered > 0) {
      V& buffer = state[states - 1];
      buffer = buffer * c.momentum + grad;
      grad = buffer;
    }
    param = param - grad * c.lr;
  }
};

// State: sum.
struct Adagrad {
  static constexpr int kMinStates = 1;
  static constexpr int kMaxStates = 1;
  static constexpr bool kMeasures = false;

  struct Group {
    double lr, lr_decay, eps, weight_decay, maximize;
  };

  template <typename T>
  struct Constants {
    T grad_factor, lr, eps, weight_decay;
  };

  template <typename T>
  static DLFAST_RULE Constants<T> prepare(const Group& group, const StepFacts& facts) {
    Constants<T> c;
    c.grad_factor = static_cast<T>(group.maximize != 0 ? -facts.grad_factor : facts.grad_factor);
    c.lr = static_cast<T>(group.lr / (1 + (facts.step - 1) * group.lr_decay));
    c.eps = static_cast<T>(group.eps);
    c.weight_decay = static_cast<T>(group.weight_decay);
    return c;
  }

  template <int states, typename V, typename T>
  static DLFAST_RULE void update(V& param, V grad, V* state, const Constants<T>& c) {
    grad = grad * c.grad_factor;
    if (c.weight_decay != 0) grad = grad + param * c.weight_decay;
    state[0] = state[0] + grad * grad;
    param = param - grad * c.lr / (square_root(state[0]) + c.eps);
  }
};

// States: exp_avg, exp_avg_sq. A rule that measures gives the direction of the step on its own: before the
// update the norms of param and direction are taken over the whole tensor, and trust is their quotient.
struct Lamb {
  static constexpr int kMinStates = 2;
  static constexpr int kMaxStates = 2;
  static constexpr bool kMeasures = true;

  struct Group {
    double lr, beta1, beta2, eps, weight_decay, maximize;
  };

  template <typename T>
  struct Constants {
    T grad_factor, lr, beta1, gain1, beta2, gain2, inv_correction1, inv_sqrt_correction2, eps, weight_decay;
  };

  template <typename T>
  static DLFAST_RULE Constants<T> prepare(const Group& group, const StepFacts& facts) {
    Constants<T> c;
    c.grad_factor = static_cast<T>(group.maximize != 0 ? -facts.grad_factor : facts.grad_factor);
    c.lr = static_cast<T>(group.lr * facts.trust);
    c.beta1 = static_cast<T>(group.beta1);
    c.gain1 = static_cast<T>(1 - group.beta1);
    c.beta2 = static_cast<T>(group.beta2);
    c.gain2 = static_cast<T>(1 - group.beta2);
    c.inv_correction1 = static_cast<T>(1 / (1 - std::pow(group.beta1, facts.step)));
    c.inv_sqrt_correction2 = static_cast<T>(1 / std::sqrt(1 - std::pow(group.beta2, facts.step)));
    c.eps = static_cast<T>(group.eps);
    c.weight_decay = static_cast<T>(group.weight_decay);
    return c;
  }

  template <typename V, typename T>
  static DLFAST_RULE V direction(V param, V grad, V* state, const Constants<T>& c) {
    grad = grad * c.grad_factor;
    state[0] = state[0] * c.beta1 + grad * c.gain1;
    state[1] = state[1] * c.beta2 + grad * grad * c.gain2;
    const V denominator = square_root(state[1]) * c.inv_sqrt_correction2 + c.eps;
    return state[0] * c.inv_correction1 / denominator + param * c.weight_decay;
  }

  template <int states, typename V, typename T>
  static DLFAST_RULE void update(V& param, V grad, V* state, const Constants<T>& c) {
    param = param - direction(param, grad, state, c) * c.lr;
  }
};

// Calls f(Rule{}) with the rule of `algorithm`. The one list of rules beside enum Algorithm.
template <typename F>
constexpr decltype(auto) with_rule(Algorithm algorithm, F&& f) {
  switch (algorithm) {
    case Algorithm::sgd:
      return f(Sgd{});
    case Algorithm::adam:
      return f(Adam{});
    case Algorithm::lion:
      return f(Lion{});
    case Algorithm::rmsprop:
      return f(RmsProp{});
    case Algorithm::adagrad:
      return f(Adagrad{});
    default:
      return f(Lamb{});
  }
}

constexpr const char* kRuleNames[kAlgorithms] = {"sgd", "adam", "lion", "rmsprop", "adagrad", "lamb"};

}  // namespace dlfast::optim
