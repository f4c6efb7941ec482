// What one native optimizer step is told, as plain data: no Torch, no CUDA.
//
// A step updates any number of tensors. Each belongs to a group, which carries the hyper-parameters, as in
// torch.optim's param_groups; a group is the rule's struct of doubles (step.h).
#pragma once

#include <cstdint>

#include "core/portability.h"

namespace dlfast::optim {

// The order is that of kRuleNames in step.h.
enum class Algorithm : int { sgd, adam, lion, rmsprop, adagrad, lamb };
constexpr int kAlgorithms = 6;

// How numbers lie in memory. code8 is one byte per number and one float scale per kCodeBlock numbers:
// `code8_signed` for moments of either sign, `code8_unsigned` for those that are never negative.
enum class Format : uint8_t { float32, float64, bfloat16, float16, code8_signed, code8_unsigned };

DLFAST_HOST_DEVICE int bytes_of(Format format) {
  switch (format) {
    case Format::float64:
      return 8;
    case Format::float32:
      return 4;
    case Format::bfloat16:
    case Format::float16:
      return 2;
    default:
      return 1;
  }
}

// Where the exact value of a 16-bit parameter is kept beside it: nowhere; the lower half of a float whose
// upper half, rounded, is the bfloat16 parameter; or a float.
enum class Master : uint8_t { none, low_half, full };

constexpr int kMaxStates = 3;
constexpr int kCodeBlock = 256;
// Numbers of the longest Group among the rules of step.h.
constexpr int kMaxHyper = 8;

DLFAST_HOST_DEVICE int64_t code_blocks(int64_t numel) {
  return (numel + kCodeBlock - 1) / kCodeBlock;
}

// The pointers address `numel` elements, without gaps, in one common order.
struct TensorRef {
  void* param;
  void* grad;                // written only where gradients are zeroed
  void* state[kMaxStates];   // in the rule's order (step.h); null where this tensor has none
  float* scale[kMaxStates];  // of states in code8
  void* average;             // moving average of the parameter, float or double; null: none is kept
  void* master;              // see `master_kind`
  void* step;  // steps taken so far: float, or double where `step_is_double`; null where none is kept
  int64_t numel;
  int64_t first_unit;  // units of work in the tensors before this one
  uint32_t id;         // tells this tensor's random numbers from those of others
  int32_t group;
  Format number;  // of param and grad
  Format state_format[kMaxStates];
  Master master_kind;
  bool stochastic_param;  // round param at random, in proportion
  bool stochastic_state;
  bool step_is_double;
};

// What a step does beside the update.
struct StepOptions {
  double grad_factor = 1;           // 1 over GradScaler's scale
  double max_grad_value = -1;       // negative: no clipping by value
  double max_grad_norm = -1;        // negative: no clipping by norm
  double clip_factor = 1;           // of a norm that was taken before
  double average_decay = 0;         // of TensorRef::average
  bool measure_norm = false;        // of the gradients, before the update
  bool skip_if_not_finite = false;  // the step finds infinities itself; needs measure_norm
  bool zero_grad = false;
  uint64_t seed = 0;         // of random rounding
  uint64_t random_step = 0;  // counts the steps that drew random numbers
};

// Splits tensors into units of at most `size` elements, numbered across all tensors, so that work can be
// balanced whatever the tensors' sizes. An empty tensor keeps one unit: its step counter advances too.
DLFAST_HOST_DEVICE int64_t units_of(int64_t numel, int64_t size) {
  return numel <= 0 ? 1 : (numel - 1) / size + 1;
}

// Sets first_unit of all; returns the number of units.
inline int64_t number_units(TensorRef* tensors, int64_t count, int64_t size) {
  int64_t units = 0;
  for (int64_t i = 0; i < count; ++i) {
    tensors[i].first_unit = units;
    units += units_of(tensors[i].numel, size);
  }
  return units;
}

}  // namespace dlfast::optim
