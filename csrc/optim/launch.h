// The CUDA side of an optimizer step, as op_plan.cpp calls it: on the current device and stream.
#pragma once

#include <cstddef>
#include <vector>

#include "optim/params.h"

namespace dlfast::optim {

// Tensors of one dtype, whose states have it too: the options of params.h are not for CUDA yet.
struct CudaStep {
  Algorithm algorithm;
  Format number;
  std::vector<TensorRef> tensors;
  std::vector<double> groups;   // kMaxHyper for each group
  const double* device_groups;  // the same in device memory, in place of `groups`; or null
  const float* grad_scale;      // device memory, or null
  const float* found_inf;       // device memory, or null
  unsigned* arrived;            // device memory, 0 between steps; null where no tensor has a step counter
};

// Whether the tensors are too many for the arguments of one kernel, so that they go through a table in
// device memory. Not while the stream is being captured into a graph: a copy from host memory would be
// replayed after that memory is gone; several launches do it then.
bool needs_memory_table(const CudaStep& step);

size_t memory_table_bytes(const CudaStep& step);

// Lays the table out in host memory, aligned to 8 bytes. Numbers the units: call it before step_cuda.
void fill_memory_table(CudaStep& step, void* host);

// `memory_table` is the copy of that table in device memory, or null.
void step_cuda(CudaStep& step, const void* memory_table);

}  // namespace dlfast::optim
