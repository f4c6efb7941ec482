// The CPU side of an optimizer step: one parallel region for any number of tensors.
#pragma once

#include <vector>

#include "common/simd.h"
#include "optim/params.h"

namespace dlfast::optim {

// tensors[i] is about to take step number steps[i]. `grad_factor` multiplies every gradient.
// Instantiated for the rules of step.h.
template <typename Rule>
void step_cpu(Number number, std::vector<TensorRef>& tensors, const std::vector<double>& steps,
              const std::vector<typename Rule::Group>& groups, double grad_factor);

// Updates elements [begin, end) of one tensor. `constants` is a Rule::Constants of the compute type: float,
// or double for float64.
using UpdateFn = void (*)(const TensorRef& tensor, const void* constants, int64_t begin, int64_t end);

struct UpdateTable {
  UpdateFn sgd[4];  // by Number
  UpdateFn adam[4];
};

const UpdateTable& updates_portable();
#if DLFAST_X86
const UpdateTable& updates_avx2();
const UpdateTable& updates_avx512();
#endif

}  // namespace dlfast::optim
