// What one native optimizer step is told, as plain data: no Torch, no CUDA.
//
// A step updates any number of tensors of one dtype. Each belongs to a group, which carries the
// hyper-parameters, as in torch.optim's param_groups.
#pragma once

#include <cstdint>

namespace dlfast::optim {

enum class Number : int { float32, float64, bfloat16, float16 };

constexpr int kMaxStates = 3;

// The pointers address `numel` elements, without gaps, in one common order.
struct TensorRef {
  void* param;
  const void* grad;
  void* state[kMaxStates];  // in the rule's order (step.h); null where this tensor has none
  float* step;              // steps taken so far, in device memory; null on the CPU and where none is kept
  int64_t numel;
  int64_t first_unit;  // units of work in the tensors before this one
  int32_t group;
};

// The learning rate is read from device memory where it is a tensor there: no wait for the host.
struct LearningRate {
  double value;
  const void* device_value;  // float or double; null: use `value`
  bool device_is_double;
};

struct SgdGroup {
  LearningRate lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
};

struct AdamGroup {
  LearningRate lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled_weight_decay;  // AdamW
  bool maximize;
};

// Splits tensors into units of at most `size` elements, numbered across all tensors, so that work can be
// balanced whatever the tensors' sizes. An empty tensor keeps one unit: its step counter advances too.
inline int64_t units_of(int64_t numel, int64_t size) {
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
