// Kernels of the optimizer step with all its options in one pass over memory.
#include "optim/kernel_step.cuh"
#include "optim/launch_kernels.h"

namespace dlfast::optim {
namespace {

// inspect: registers 128, static 4608, holds LDG.128|LD.128 STG.128|ST.128
template <typename Rule, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    full_step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s) {
  __shared__ BlockShared<Rule, T, Pass::full> shared;
  step_block<Rule, T, Pass::full>(table, s, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

}  // namespace

void launch_full(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid) {
  with_rule(algorithm, [&](auto rule) {
    with_number(number, [&](auto x) {
      full_step_kernel<decltype(rule), decltype(x)><<<grid.blocks, kThreads, 0, grid.stream>>>(table, s);
      check_step("full_step_kernel", grid);
    });
  });
}

}  // namespace dlfast::optim
