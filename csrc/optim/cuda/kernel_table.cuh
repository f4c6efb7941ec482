// The tensors of one launch of the CUDA optimizer step, and what its blocks find out before they work.
//
// One launch serves any number of tensors: block b works on unit b (params.h) of all units of the launch.
// Nothing is decided on the host that depends on device memory: found_inf, the loss scale, the norm of the
// gradients, tensor learning rates and all counters are read here.
#pragma once

#include "core/portability.h"
#include "optim/cuda/step.h"
#include "optim/formats.h"

namespace dlfast::optim {

constexpr int kThreads = 256;
// Blocks that a multiprocessor shall hold at a time: bounds the registers, at what spills none. Three states
// of 16-bit parameters, which lanes take eight at a time, need the most.
template <typename Rule, typename T>
constexpr bool kNeedsMost = Rule::kMaxStates == 3 && sizeof(T) == sizeof(uint16_t);
template <typename Rule, typename T>
constexpr int kPlainBlocks = kNeedsMost<Rule, T> ? 2 : 3;
template <typename Rule, typename T>
constexpr int kFullBlocks = kNeedsMost<Rule, T> ? 1 : 2;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Elements of a unit: four 16-byte accesses per thread and operand for float.
constexpr int kUnit = 4096;
constexpr int kPackBytes = 16;
static_assert(kUnit % kCodeBlock == 0 && kCodeBlock % kRandomTile == 0);

// The hyper-parameters of a group, whatever the rule.
struct GroupRef {
  double numbers[kMaxHyper];
};

constexpr int kTableTensors = 28;
constexpr int kTableGroups = 8;

// In kernel arguments (at most 4096 bytes of them), or in device memory where the far pointers are set.
struct Table {
  TensorRef tensors[kTableTensors];
  GroupRef groups[kTableGroups];
  const TensorRef* far_tensors;
  const GroupRef* far_groups;  // groups may lie in device memory although the tensors do not
  int64_t count;               // tensors

  DLFAST_DEVICE const TensorRef* all() const { return far_tensors == nullptr ? tensors : far_tensors; }
  DLFAST_DEVICE const GroupRef& group_of(const TensorRef& t) const {
    return (far_groups == nullptr ? groups : far_groups)[t.group];
  }
};
static_assert(sizeof(Table) + sizeof(StepScalars) <= 4096, "kernel arguments");

// Calls f(T{}) with the type of `number`, the format of parameters.
template <typename F>
void with_number(Format number, F&& f) {
  switch (number) {
    case Format::float64:
      return f(double{});
    case Format::bfloat16:
      return f(__nv_bfloat16{});
    case Format::float16:
      return f(__half{});
    default:
      return f(float{});
  }
}

// The tensor that holds `unit`: the last one whose first unit is not after it.
DLFAST_HOST_DEVICE int64_t find_tensor(const TensorRef* tensors, int64_t count, int64_t unit) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (tensors[middle].first_unit <= unit ? low : high) = middle;
  }
  return low;
}

// The elements of `unit` in its tensor.
struct UnitSpan {
  int64_t begin;
  int count;
};

DLFAST_HOST_DEVICE UnitSpan span_of(const TensorRef& t, int64_t unit) {
  const int64_t begin = (unit - t.first_unit) * kUnit;
  const int64_t left = t.numel - begin;
  return {begin, left < kUnit ? static_cast<int>(left) : kUnit};
}

DLFAST_DEVICE double unscale_of(const StepScalars& s) {
  return s.memory.grad_scale == nullptr ? s.options.grad_factor : 1.0 / *s.memory.grad_scale;
}

struct Verdict {
  double norm;
  double clip;  // what unscaled gradients are multiplied by
  bool skip;
};

DLFAST_DEVICE Verdict verdict_of(const StepScalars& s) {
  Verdict v{.norm = 0, .clip = s.options.clip_factor, .skip = false};
  for (int i = 0; i < s.squares_count; ++i) v.norm += s.memory.squares[i];
  v.norm = sqrt(v.norm);
  if (s.squares_count > 0 && s.options.max_grad_norm >= 0)
    v.clip *= clip_factor(v.norm, s.options.max_grad_norm);
  const bool finite = v.norm - v.norm == 0;
  v.skip = (s.memory.found_inf != nullptr && *s.memory.found_inf != 0) ||
           (s.options.skip_if_not_finite && !finite);
  return v;
}

// Whether the calling thread, one of each block, is the last of its launch to come here: all that other
// blocks wrote and read before lies behind.
DLFAST_DEVICE bool arrives_last(unsigned* arrived, unsigned blocks) {
  __threadfence();
  const bool last = atomicAdd(arrived, 1u) == blocks - 1;
  __threadfence();
  if (last) atomicExch(arrived, 0u);
  return last;
}

}  // namespace dlfast::optim
