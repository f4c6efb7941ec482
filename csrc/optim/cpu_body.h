// The body of the CPU step for one SIMD level, compiled once per level by cpu_step_<level>.cpp, which
// defines DLFAST_LEVEL (its name) and DLFAST_LANES (floats in a register). Include order: common/simd.h.

#include "common/low_precision.h"
#include "optim/step.h"

namespace dlfast::optim {
namespace {

template <typename Rule, typename T, int states>
DLFAST_INLINE void update_vector(T* param, const T* grad, T* const* state,
                                 const typename Rule::template Constants<typename Compute<T>::type>& c) {
  constexpr int kLanes = DLFAST_LANES * sizeof(float) / sizeof(typename Compute<T>::type);
  using V = Vec<typename Compute<T>::type, kLanes>;
  V p = load_as<T, kLanes>(param);
  V s[kMaxStates];
  for (int k = 0; k < states; ++k) s[k] = load_as<T, kLanes>(state[k]);
  Rule::template update<states>(p, load_as<T, kLanes>(grad), s, c);
  store_as<T, kLanes>(param, p);
  for (int k = 0; k < states; ++k) store_as<T, kLanes>(state[k], s[k]);
}

template <typename Rule, typename T, int states>
void update_range(const TensorRef& tensor, const void* constants, int64_t begin, int64_t end) {
  using Constants = typename Rule::template Constants<typename Compute<T>::type>;
  constexpr int64_t kLanes = DLFAST_LANES * sizeof(float) / sizeof(typename Compute<T>::type);
  const Constants c = *static_cast<const Constants*>(constants);
  T* param = static_cast<T*>(tensor.param) + begin;
  const T* grad = static_cast<const T*>(tensor.grad) + begin;
  T* state[kMaxStates] = {};
  for (int k = 0; k < states; ++k) state[k] = static_cast<T*>(tensor.state[k]) + begin;

  int64_t left = end - begin;
  for (; left >= kLanes; left -= kLanes) {
    update_vector<Rule, T, states>(param, grad, state, c);
    param += kLanes;
    grad += kLanes;
    for (int k = 0; k < states; ++k) state[k] += kLanes;
  }
  if (left == 0) return;

  // The rest goes through the same vector code, so that a result does not depend on where ranges end.
  T rest[2 + kMaxStates][kLanes] = {};
  T* rest_state[kMaxStates];
  const size_t bytes = static_cast<size_t>(left) * sizeof(T);
  std::memcpy(rest[0], param, bytes);
  std::memcpy(rest[1], grad, bytes);
  for (int k = 0; k < states; ++k) {
    rest_state[k] = rest[2 + k];
    std::memcpy(rest_state[k], state[k], bytes);
  }
  update_vector<Rule, T, states>(rest[0], rest[1], rest_state, c);
  std::memcpy(param, rest[0], bytes);
  for (int k = 0; k < states; ++k) std::memcpy(state[k], rest_state[k], bytes);
}

template <typename Rule, typename T>
void update_tensor(const TensorRef& tensor, const void* constants, int64_t begin, int64_t end) {
  if constexpr (Rule::kMinStates != Rule::kMaxStates) {
    if (tensor.state[Rule::kMaxStates - 1] == nullptr) {
      update_range<Rule, T, Rule::kMinStates>(tensor, constants, begin, end);
      return;
    }
  }
  update_range<Rule, T, Rule::kMaxStates>(tensor, constants, begin, end);
}

#define DLFAST_UPDATES(Rule)                                                               \
  {update_tensor<Rule, float>, update_tensor<Rule, double>, update_tensor<Rule, BFloat16>, \
   update_tensor<Rule, Float16>}
constexpr UpdateTable kUpdates = {DLFAST_UPDATES(Sgd), DLFAST_UPDATES(Adam)};
#undef DLFAST_UPDATES

}  // namespace

#define DLFAST_CONCAT(a, b) a##b
#define DLFAST_EXPAND(a, b) DLFAST_CONCAT(a, b)
const UpdateTable& DLFAST_EXPAND(updates_, DLFAST_LEVEL)() {
  return kUpdates;
}
#undef DLFAST_EXPAND
#undef DLFAST_CONCAT

}  // namespace dlfast::optim
