// The CUDA body of an optimizer step: one block updates one unit of one tensor.
//
// Pass::plain is the update alone, of states in the parameter's own format. Pass::full does all that params.h
// knows in the same pass over memory: other formats, masters, clamping, clipping, averaging, clearing. A step
// that is skipped changes nothing, or clears gradients. Pass::measure writes nothing but what a rule that
// measures wants to know of each unit (see Lamb in step.h).
#pragma once

#include "optim/cuda/kernel_formats.cuh"
#include "optim/cuda/kernel_sum.cuh"

namespace dlfast::optim {

enum class Pass { plain, full, measure };

template <typename T>
constexpr int kWide = sizeof(T) == sizeof(double);

// Numbers that a lane has at a time. Elsewhere than in plain steps a warp's block is a block of codes, and a
// float32 and a 16-bit array are both read without gaps.
template <typename T, Pass pass>
constexpr int kPerLane = pass == Pass::plain ? kPackBytes / sizeof(T) : (kWide<T> ? 4 : kCodeBlock / kWarp);
template <typename T, Pass pass>
constexpr int kAccess = pass == Pass::plain || kWide<T> ? kPackBytes / sizeof(T) : kPackBytes / sizeof(float);

template <typename Rule, typename T, Pass pass>
struct BlockShared {
  using Real = Accumulator<T>;
  static constexpr bool kDraws = pass == Pass::full && !kWide<T>;
  typename Rule::template Constants<Real> constants;
  TensorRef tensor;
  uint64_t random_step;
  Real unscale;  // of clamped gradients
  bool skip, last;
  uint16_t random[kDraws ? kWarps : 1][kDraws ? kCodeBlock : 1];
  double sums[kWarps];
};

// What thread 0 of a block finds out for the others.
template <typename Rule, typename T, Pass pass>
DLFAST_DEVICE void prepare_block(const Table& table, const StepScalars& s, unsigned block, unsigned blocks,
                                 BlockShared<Rule, T, pass>& shared) {
  const Verdict verdict = verdict_of(s);
  const TensorRef* tensors = table.all();
  const int64_t index = find_tensor(tensors, table.count, block);
  shared.tensor = tensors[index];
  shared.skip = verdict.skip;
  shared.last = false;
  if (pass == Pass::full && block == 0) {
    if (s.memory.norm != nullptr) {
      if (!verdict.skip) *s.memory.last_norm = verdict.norm;
      const double norm = *s.memory.last_norm;
      if (s.norm_is_double) {
        *static_cast<double*>(s.memory.norm) = norm;
      } else {
        *static_cast<float*>(s.memory.norm) = static_cast<float>(norm);
      }
    }
    if (s.memory.skipped != nullptr) *s.memory.skipped = verdict.skip ? 1.0f : 0.0f;
  }
  if (verdict.skip) return;

  const bool clamps = pass != Pass::plain && s.options.max_grad_value >= 0;
  const double unscale = unscale_of(s);
  const auto* taken = static_cast<const float*>(shared.tensor.step);
  const StepFacts facts{
      .step = taken == nullptr ? 1.0 : *taken + 1.0,
      .grad_factor = clamps ? verdict.clip : verdict.clip * unscale,
      .trust = pass == Pass::full && Rule::kMeasures ? s.memory.trust[index] : 1.0,
  };
  typename Rule::Group group;
  memcpy(&group, table.group_of(shared.tensor).numbers, sizeof(group));
  shared.constants = Rule::template prepare<Accumulator<T>>(group, facts);
  if constexpr (pass != Pass::plain) shared.unscale = static_cast<Accumulator<T>>(unscale);
  if constexpr (pass == Pass::full) {
    shared.random_step = s.options.random_step;
    if (s.memory.random_steps != nullptr) shared.random_step += static_cast<uint64_t>(*s.memory.random_steps);
  }
  // Counters may advance once every block has read them: the last block to come here does it.
  if (pass != Pass::measure && s.memory.arrived != nullptr)
    shared.last = arrives_last(s.memory.arrived, blocks);
}

template <Pass pass>
DLFAST_DEVICE void advance_counters(const Table& table, const StepScalars& s, int thread) {
  const TensorRef* tensors = table.all();
  for (int64_t i = thread; i < table.count; i += kThreads) {
    auto* step = static_cast<float*>(tensors[i].step);
    if (step != nullptr) *step += 1;
  }
  if (pass == Pass::full && thread == 0 && s.last_launch && s.memory.random_steps != nullptr)
    ++*s.memory.random_steps;
}

// The exact value of the parameter.
template <typename T, typename Lane>
DLFAST_DEVICE void load_param(const Lane& lane, const TensorRef& t, Accumulator<T>* p) {
  if constexpr (sizeof(T) == sizeof(uint16_t)) {
    if (t.master_kind == Master::full) return lane.template load<float>(t.master, p);
    if (t.master_kind == Master::low_half) {
      uint32_t upper[Lane::kNumbers];
      const auto as_is = [](uint16_t x) { return static_cast<uint32_t>(x); };
      lane.template load<uint16_t>(t.param, upper, as_is);
      uint32_t lower[Lane::kNumbers];
      lane.template load<uint16_t>(t.master, lower, as_is);
#pragma unroll
      for (int i = 0; i < Lane::kNumbers; ++i) p[i] = join_halves<float>(upper[i], lower[i]);
      return;
    }
  }
  lane.template load<T>(t.param, p);
}

// Leaves in `p` what is averaged: the exact value where it is kept, else the rounded one.
template <typename T, typename Lane>
DLFAST_DEVICE void store_param(const Lane& lane, const TensorRef& t, const WarpRandom& random,
                               Accumulator<T>* p) {
  if constexpr (sizeof(T) != sizeof(uint16_t)) {
    lane.template store<T>(t.param, p);
  } else if (t.master_kind == Master::low_half) {
    uint32_t upper[Lane::kNumbers], lower[Lane::kNumbers];
#pragma unroll
    for (int i = 0; i < Lane::kNumbers; ++i) split_halves(p[i], upper[i], lower[i]);
    const auto as_is = [](uint32_t x, int) { return static_cast<uint16_t>(x); };
    lane.template store<uint16_t>(t.param, upper, as_is);
    lane.template store<uint16_t>(t.master, lower, as_is);
  } else {
    if (t.master_kind == Master::full) lane.template store<float>(t.master, p);
    if (t.stochastic_param) random.draw(lane, 0);
    lane.template store<T>(t.param, p, [&](float x, int i) {
      const T stored = t.stochastic_param ? round_at_random(x, random.of(lane, i), T{}) : narrow<T>(x);
      if (t.master_kind == Master::none) p[i] = widen(stored);
      return stored;
    });
  }
}

// What an updated block leaves in memory. Overwrites the gradients in `g`.
template <typename T, int states, Pass pass, typename Lane>
DLFAST_DEVICE void store_block(const Lane& lane, const TensorRef& t, const StepOptions& options,
                               const WarpRandom& random, Accumulator<T>* p, Accumulator<T>* g,
                               Accumulator<T> (*state)[Lane::kNumbers]) {
  using Real = Accumulator<T>;
  if constexpr (pass == Pass::plain) {
#pragma unroll
    for (int k = 0; k < states; ++k) lane.template store<T>(t.state[k], state[k]);
    lane.template store<T>(t.param, p);
  } else {
#pragma unroll
    for (int k = 0; k < states; ++k) {
      if constexpr (kWide<T>) {
        lane.template store<T>(t.state[k], state[k]);
      } else {
        store_as(lane, t.state_format[k], state[k], random, t.stochastic_state, k + 1, t.state[k],
                 t.scale[k]);
      }
    }
    store_param<T>(lane, t, random, p);
    if (t.average != nullptr) {
      const Real decay = static_cast<Real>(options.average_decay);
      const Real gain = static_cast<Real>(1 - options.average_decay);
      lane.template load<Real>(t.average, g);
#pragma unroll
      for (int i = 0; i < Lane::kNumbers; ++i) g[i] = g[i] * decay + p[i] * gain;
      lane.template store<Real>(t.average, g);
    }
    if (options.zero_grad) lane.template clear<T>(t.grad);
  }
}

// Elements [first, first + count), one block of a warp. In Pass::measure adds to sums[0] and sums[1] the
// squares of parameter and direction.
template <typename Rule, typename T, int states, Pass pass, int kWidth>
DLFAST_DEVICE void update_block(BlockShared<Rule, T, pass>& shared, const StepOptions& options, int64_t first,
                                int count, bool wide, int thread, double* sums) {
  using Real = Accumulator<T>;
  constexpr int kCount = kPerLane<T, pass>;
  const Lane<kCount, kWidth> lane{.first = first, .count = count, .lane = thread % kWarp, .wide = wide};
  const TensorRef& t = shared.tensor;
  const WarpRandom random{.shared = shared.random[BlockShared<Rule, T, pass>::kDraws ? thread / kWarp : 0],
                          .seed = options.seed,
                          .step = shared.random_step,
                          .tensor = t.id};

  Real p[kCount], g[kCount], state[states > 0 ? states : 1][kCount];
  if constexpr (pass == Pass::plain) {
    lane.template load<T>(t.param, p);
  } else {
    load_param<T>(lane, t, p);
  }
  lane.template load<T>(t.grad, g);
#pragma unroll
  for (int k = 0; k < states; ++k) {
    if constexpr (pass == Pass::plain || kWide<T>) {
      lane.template load<T>(t.state[k], state[k]);
    } else {
      load_as(lane, t.state_format[k], t.state[k], t.scale[k], state[k]);
    }
  }
  if (pass != Pass::plain && options.max_grad_value >= 0) {
    const Real limit = static_cast<Real>(options.max_grad_value);
#pragma unroll
    for (int i = 0; i < kCount; ++i) g[i] = clamped(g[i] * shared.unscale, limit);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Real s[states > 0 ? states : 1];
#pragma unroll
    for (int k = 0; k < states; ++k) s[k] = state[k][i];
    if constexpr (pass == Pass::measure) {
      const double direction = Rule::direction(p[i], g[i], s, shared.constants);
      if (!lane.has(i)) continue;
      sums[0] += static_cast<double>(p[i]) * p[i];
      sums[1] += direction * direction;
    } else {
      Rule::template update<states>(p[i], g[i], s, shared.constants);
#pragma unroll
      for (int k = 0; k < states; ++k) state[k][i] = s[k];
    }
  }
  if constexpr (pass != Pass::measure) store_block<T, states, pass>(lane, t, options, random, p, g, state);
}

// Whether wide accesses are aligned in every array of the tensor.
template <typename T, Pass pass>
DLFAST_DEVICE bool is_aligned(const TensorRef& t) {
  constexpr int kWidth = kAccess<T, pass>;
  const auto fits = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  bool all = fits(t.param, kWidth * sizeof(T)) && fits(t.grad, kWidth * sizeof(T));
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) {
    const int bytes = pass == Pass::plain ? sizeof(T) : bytes_of(t.state_format[k]);
    all = all && (t.state[k] == nullptr || fits(t.state[k], kWidth * bytes));
  }
  if (pass == Pass::plain) return all;
  const int master_bytes = t.master_kind == Master::full ? sizeof(float) : sizeof(uint16_t);
  return all && fits(t.average, kWidth * sizeof(Accumulator<T>)) && fits(t.master, kWidth * master_bytes);
}

// With as many states as the tensor has.
template <typename Rule, typename T, int states, Pass pass>
DLFAST_DEVICE void update_unit(BlockShared<Rule, T, pass>& shared, const StepOptions& options,
                               const UnitSpan& span, int thread, double* sums) {
  if constexpr (states > Rule::kMinStates) {
    if (shared.tensor.state[states - 1] == nullptr) {
      update_unit<Rule, T, states - 1>(shared, options, span, thread, sums);
      return;
    }
  }
  constexpr int kBlock = kPerLane<T, pass> * kWarp;
  static_assert(kUnit % kBlock == 0);
  const bool aligned = is_aligned<T, pass>(shared.tensor);
  for (int at = thread / kWarp * kBlock; at < span.count; at += kWarps * kBlock) {
    const int left = span.count - at;
    const bool wide = aligned && left >= kBlock;
    // The plain step has code of its own for what is not wide, in which neighbouring lanes stay neighbours.
    if (pass != Pass::plain || wide) {
      update_block<Rule, T, states, pass, kAccess<T, pass>>(shared, options, span.begin + at, left,
                                                            pass != Pass::plain ? wide : true, thread, sums);
    } else {
      update_block<Rule, T, states, pass, 1>(shared, options, span.begin + at, left, false, thread, sums);
    }
  }
}

// Blocks [0, blocks) of one launch, each with kThreads threads.
template <typename Rule, typename T, Pass pass>
DLFAST_DEVICE void step_block(const Table& table, const StepScalars& s, unsigned block, unsigned blocks,
                              int thread, BlockShared<Rule, T, pass>& shared) {
  if (thread == 0) prepare_block<Rule, T, pass>(table, s, block, blocks, shared);
  __syncthreads();
  if (shared.last) advance_counters<pass>(table, s, thread);
  const UnitSpan span = span_of(shared.tensor, block);
  if (shared.skip) {
    if (pass != Pass::full || !s.options.zero_grad) return;
    auto* grad = static_cast<T*>(shared.tensor.grad) + span.begin;
    for (int i = thread; i < span.count; i += kThreads) grad[i] = narrow<T>(0);
    return;
  }
  double sums[2] = {};
  update_unit<Rule, T, Rule::kMaxStates>(shared, s.options, span, thread, sums);
  if constexpr (pass == Pass::measure) {
    for (int k = 0; k < 2; ++k) {
      const double sum = sum_of_block(sums[k], thread, shared.sums);
      if (thread == 0) s.memory.parts[2 * static_cast<int64_t>(block) + k] = sum;
    }
  }
}

}  // namespace dlfast::optim
