// The CUDA side of an optimizer step, as op.cpp calls it: on the current device and stream.
#pragma once

#include <cstddef>
#include <vector>

#include "optim/params.h"

namespace dlfast::optim {

struct CudaStep {
  Number number;
  std::vector<TensorRef> tensors;
  const float* grad_scale;  // device memory, or null
  const float* found_inf;   // device memory, or null
  unsigned* arrived;        // device memory, 0 between steps; null where no tensor has a step counter
};

// Whether the tensors are too many for the arguments of one kernel, so that they go through a table in
// device memory. Never while the stream is being captured into a graph: a copy from host memory would be
// replayed after that memory is gone; several launches do it then.
bool needs_memory_table(size_t tensors, size_t groups);

template <typename Rule>
size_t memory_table_bytes(size_t tensors, size_t groups) {
  return tensors * sizeof(TensorRef) + groups * sizeof(typename Rule::Group);
}

// Lays the table out in host memory, aligned to 8 bytes. Numbers the units: call it before step_cuda.
template <typename Rule>
void fill_memory_table(CudaStep& step, const std::vector<typename Rule::Group>& groups, void* host);

// `memory_table` is the copy of that table in device memory, or null. Instantiated for the rules of step.h.
template <typename Rule>
void step_cuda(CudaStep& step, const std::vector<typename Rule::Group>& groups, const void* memory_table);

}  // namespace dlfast::optim
