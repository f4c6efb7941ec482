// The CUDA side of an optimizer step, as op_cuda.cpp calls it: on the current device and stream.
#pragma once

#include <cstddef>
#include <vector>

#include "optim/params.h"

namespace dlfast::optim {

// Device memory that a step reads and writes beside its tensors; null where it has no use for it.
struct StepMemory {
  const float* grad_scale = nullptr;  // in place of StepOptions::grad_factor
  const float* found_inf = nullptr;
  unsigned* arrived = nullptr;      // counts blocks; 0 between launches
  double* squares = nullptr;        // of all gradients: a sum for each norm launch of the step
  int64_t* random_steps = nullptr;  // steps that drew random numbers, beside StepOptions::random_step
  double* last_norm = nullptr;      // of the last step that was not skipped
  void* norm = nullptr;             // where to tell that: a float, or a double (StepScalars)
  float* skipped = nullptr;         // where to tell whether this step was
  double* parts = nullptr;          // sums of units, as a first pass leaves them
  double* trust = nullptr;          // of each tensor; see Lamb in step.h
};

struct StepScalars {
  StepOptions options;
  StepMemory memory;
  int32_t squares_count = 0;
  bool norm_is_double = false;
  bool last_launch = true;  // of the step on this device: the one that advances random_steps
};

// Tensors of one dtype.
struct CudaStep {
  Algorithm algorithm;
  Format number;
  std::vector<TensorRef> tensors;
  std::vector<double> groups;   // kMaxHyper for each group
  const double* device_groups;  // the same in device memory, in place of `groups`; or null
  const void* far_table;        // the copy in device memory of what fill_far_table laid out; or null
  StepScalars scalars;
};

// Whether the tensors are too many for the arguments of one kernel, so that they go through a table in
// device memory. Not while the stream is being captured into a graph: a copy from host memory would be
// replayed after that memory is gone; several launches do it then.
bool needs_far_table(const CudaStep& step);

size_t far_table_bytes(const CudaStep& step);

// Lays the table out in host memory, aligned to 8 bytes. Numbers the units.
void fill_far_table(CudaStep& step, void* host);

// Doubles that StepMemory::parts and StepMemory::trust must have room for.
int64_t parts_of_norm(const CudaStep& step);
int64_t parts_of_step(const CudaStep& step);
int64_t trusts_of_step(const CudaStep& step);

// Writes the sum of squares of the unscaled, value-clipped gradients to squares[index], in a fixed order.
void norm_cuda(CudaStep& step, int index);

void step_cuda(CudaStep& step);

// Where unit `unit` of tensors of `numels` elements lies: the tensor, its first element and their number.
struct UnitPlace {
  int64_t tensor, begin;
  int count;
};
UnitPlace place_of_unit(const std::vector<int64_t>& numels, int64_t unit);

}  // namespace dlfast::optim
