// The kernels of an optimizer step, a translation unit for each family, as launch.cu starts them.
#pragma once

#include <cuda_runtime_api.h>

#include "core/launch_check.h"
#include "optim/cuda/kernel_table.cuh"
#include "optim/cuda/step.h"

namespace dlfast::optim {

// Where a launch runs.
struct Grid {
  unsigned blocks;
  cudaStream_t stream;
};

// For check_launch, after every launch: the kernel and its problem.
inline auto launch_of(const char* kernel, Algorithm algorithm, const Table& table, Grid grid) {
  return [=, count = table.count] {
    return c10::str("in ", kernel, " of ", kRuleNames[static_cast<int>(algorithm)], ", ", grid.blocks,
                    " blocks of ", kThreads, " threads, for ", count, " tensors");
  };
}

// launch_plain.cu: the update alone.
void launch_plain(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid);
// launch_full.cu: the update with everything else in the same pass.
void launch_full(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid);
// launch_norm.cu: see norm_block and trust_block; the measuring pass of rules that have one.
void launch_norm(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, int index,
                 bool adds, Grid grid);
void launch_measure(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid);
void launch_trust(Algorithm algorithm, const Table& table, const StepScalars& s, Grid grid);

}  // namespace dlfast::optim
