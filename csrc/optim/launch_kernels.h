// The kernels of an optimizer step, a translation unit for each family, as launch.cu starts them.
#pragma once

#include <c10/util/StringUtil.h>
#include <cuda_runtime_api.h>

#include "common/launch_check.h"
#include "optim/launch.h"

namespace dlfast::optim {

struct Table;  // kernel_table.cuh

// Where a launch runs.
struct Grid {
  unsigned blocks;
  cudaStream_t stream;
};

// launch_plain.cu: the update alone.
void launch_plain(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid);
// launch_full.cu: the update with everything else in the same pass.
void launch_full(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid);
// launch_norm.cu: see norm_block and trust_block; the measuring pass of rules that have one.
void launch_norm(Format number, const Table& table, const StepScalars& s, int index, bool adds, Grid grid);
void launch_measure(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid);
void launch_trust(const Table& table, const StepScalars& s, Grid grid);

// After every launch; names the kernel of an error.
inline void check_step(const char* kernel, const Grid& grid) {
  check_launch([&] { return c10::str("in ", kernel, " of an optimizer step, ", grid.blocks, " blocks"); });
}

}  // namespace dlfast::optim
