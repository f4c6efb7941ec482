// The functions of the CPU step for one SIMD level, compiled once per level by cpu_step_<level>.cpp, which
// defines DLFAST_LEVEL (its name) and DLFAST_LANES (floats in a register). Include order: core/simd.h.

#include "optim/cpu/formats.h"
#include "optim/step.h"

namespace dlfast::optim {
namespace {

template <typename Real>
constexpr int kLanesOf = DLFAST_LANES * sizeof(float) / sizeof(Real);

// Elements from param[at]: a whole vector in place, or `rest` of one through copies, by the same code, so
// that a result does not depend on where ranges end. f(param, grad, states) gets the vectors.
template <typename Real, int states, bool writes, typename F>
DLFAST_INLINE void for_elements(Real* param, const Real* grad, Real* const* state, int64_t count, F&& f) {
  constexpr int64_t kWidth = kLanesOf<Real>;
  using V = Vec<Real, kWidth>;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    V p = load<V>(param + i);
    V s[states > 0 ? states : 1];
    for (int k = 0; k < states; ++k) s[k] = load<V>(state[k] + i);
    f(p, load<V>(grad + i), s);
    if constexpr (writes) {
      store(param + i, p);
      for (int k = 0; k < states; ++k) store(state[k] + i, s[k]);
    }
  }
  if (i == count) return;
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(Real);
  V p = {}, g = {};
  V s[states > 0 ? states : 1] = {};
  std::memcpy(&p, param + i, bytes);
  std::memcpy(&g, grad + i, bytes);
  for (int k = 0; k < states; ++k) std::memcpy(&s[k], state[k] + i, bytes);
  f(p, g, s);
  if constexpr (writes) {
    std::memcpy(param + i, &p, bytes);
    for (int k = 0; k < states; ++k) std::memcpy(state[k] + i, &s[k], bytes);
  }
}

template <typename Rule, typename Real, int states>
void update_block(void* param, const void* grad, void* const* state, int64_t count, const void* constants) {
  using V = Vec<Real, kLanesOf<Real>>;
  const auto c = *static_cast<const typename Rule::template Constants<Real>*>(constants);
  Real* typed[kMaxStates] = {};
  for (int k = 0; k < states; ++k) typed[k] = static_cast<Real*>(state[k]);
  for_elements<Real, states, true>(static_cast<Real*>(param), static_cast<const Real*>(grad), typed, count,
                                   [&](V& p, V g, V* s)
                                       DLFAST_INLINE_LAMBDA { Rule::template update<states>(p, g, s, c); });
}

template <typename Real, int kWidth>
DLFAST_INLINE double sum_of(Vec<double, kWidth> v) {
  double sum = 0;
  for (int l = 0; l < kWidth; ++l) sum += v[l];
  return sum;
}

template <typename Rule, typename Real>
void measure_block(const void* param, const void* grad, void* const* state, int64_t count,
                   const void* constants, double* sums) {
  constexpr int kWidth = kLanesOf<Real>;
  using V = Vec<Real, kWidth>;
  using Wide = Vec<double, kWidth>;
  const auto c = *static_cast<const typename Rule::template Constants<Real>*>(constants);
  Real* typed[kMaxStates] = {};
  for (int k = 0; k < Rule::kMaxStates; ++k) typed[k] = static_cast<Real*>(state[k]);
  Wide of_param = {}, of_direction = {};
  int64_t left = count;
  for_elements<Real, Rule::kMaxStates, false>(
      static_cast<Real*>(const_cast<void*>(param)), static_cast<const Real*>(grad), typed, count,
      [&](V& p, V g, V* s) DLFAST_INLINE_LAMBDA {
        const Wide wide = __builtin_convertvector(p, Wide);
        Wide direction = __builtin_convertvector(Rule::direction(p, g, s, c), Wide);
        // What fills up a tail has none: with eps=0 its direction is 0 / 0.
        for (int64_t l = left; l < kWidth; ++l) direction[l] = 0;
        left -= kWidth;
        of_param += wide * wide;
        of_direction += direction * direction;
      });
  sums[0] += sum_of<Real, kWidth>(of_param);
  sums[1] += sum_of<Real, kWidth>(of_direction);
}

template <typename Real>
void clamp_block(const void* from, double factor, double limit, int64_t count, void* to) {
  constexpr int kWidth = kLanesOf<Real>;
  using V = Vec<Real, kWidth>;
  const auto* in = static_cast<const Real*>(from);
  auto* out = static_cast<Real*>(to);
  const Real f = static_cast<Real>(factor);
  const V most = V{} + static_cast<Real>(limit);
  // NaN compares false and stays.
  const auto clamped = [&](V x) DLFAST_INLINE_LAMBDA {
    x = x * f;
    x = x > most ? most : x;
    return x < -most ? -most : x;
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, clamped(load<V>(in + i)));
  if (i == count) return;
  V last = {};
  std::memcpy(&last, in + i, static_cast<size_t>(count - i) * sizeof(Real));
  last = clamped(last);
  std::memcpy(out + i, &last, static_cast<size_t>(count - i) * sizeof(Real));
}

template <typename Real>
double squares_block(const void* from, int64_t count) {
  constexpr int kWidth = kLanesOf<Real>;
  using V = Vec<Real, kWidth>;
  using Wide = Vec<double, kWidth>;
  const auto* in = static_cast<const Real*>(from);
  // Two chains of additions. A double holds the square of every float; of a double it may overflow, which
  // is told from an infinity by x - x.
  Wide sums[2] = {}, bad = {};
  const auto add = [&](V x, int chain) DLFAST_INLINE_LAMBDA {
    const Wide wide = __builtin_convertvector(x, Wide);
    sums[chain] += wide * wide;
    if constexpr (sizeof(Real) == sizeof(double)) bad += wide - wide;
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    add(load<V>(in + i), 0);
    add(load<V>(in + i + kWidth), 1);
  }
  for (; i < count; i += kWidth) {
    V last = {};
    const int64_t left = count - i < kWidth ? count - i : kWidth;
    std::memcpy(&last, in + i, static_cast<size_t>(left) * sizeof(Real));
    add(last, 0);
  }
  return sum_of<Real, kWidth>(sums[0] + sums[1] + bad);
}

template <typename Real>
void average_block(void* average, const void* param, double decay, int64_t count) {
  constexpr int kWidth = kLanesOf<Real>;
  using V = Vec<Real, kWidth>;
  auto* mean = static_cast<Real*>(average);
  const auto* in = static_cast<const Real*>(param);
  const Real d = static_cast<Real>(decay), gain = static_cast<Real>(1 - decay);
  const auto mixed = [&](V m, V p) DLFAST_INLINE_LAMBDA { return m * d + p * gain; };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(mean + i, mixed(load<V>(mean + i), load<V>(in + i)));
  if (i == count) return;
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(Real);
  V m = {}, p = {};
  std::memcpy(&m, mean + i, bytes);
  std::memcpy(&p, in + i, bytes);
  m = mixed(m, p);
  std::memcpy(mean + i, &m, bytes);
}

template <typename Rule, int states>
constexpr void enter_updates(CpuKernels& table, int rule) {
  table.update[rule][states][0] = update_block<Rule, float, states>;
  table.update[rule][states][1] = update_block<Rule, double, states>;
  if constexpr (states < Rule::kMaxStates) enter_updates<Rule, states + 1>(table, rule);
}

constexpr CpuKernels make_kernels() {
  CpuKernels table = {};
  for (int rule = 0; rule < kAlgorithms; ++rule) {
    with_rule(static_cast<Algorithm>(rule), [&](auto r) {
      using Rule = decltype(r);
      enter_updates<Rule, Rule::kMinStates>(table, rule);
      if constexpr (Rule::kMeasures) {
        table.measure[rule][0] = measure_block<Rule, float>;
        table.measure[rule][1] = measure_block<Rule, double>;
      }
    });
  }
  table.load = load_block;
  table.save = save_block;
  table.join_halves = join_block;
  table.split_halves = split_block;
  table.random = random_block;
  table.clamp[0] = clamp_block<float>;
  table.clamp[1] = clamp_block<double>;
  table.squares[0] = squares_block<float>;
  table.squares[1] = squares_block<double>;
  table.average[0] = average_block<float>;
  table.average[1] = average_block<double>;
  return table;
}

}  // namespace

namespace DLFAST_LEVEL {

inline const CpuKernels& step_kernels() {
  static constexpr CpuKernels kTable = make_kernels();
  return kTable;
}

}  // namespace DLFAST_LEVEL

}  // namespace dlfast::optim
