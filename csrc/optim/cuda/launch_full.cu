// Kernels of the optimizer step with all its options in one pass over memory.
#include "optim/cuda/kernel_step.cuh"
#include "optim/cuda/launch_kernels.cuh"

namespace dlfast::optim {
namespace {

// inspect: registers 128, static 4608, holds LDG.128|LD.128 STG.128|ST.128
// inspect for (Adam|RmsProp), __(half|nv_bfloat16): registers 192
template <typename Rule, typename T>
__global__ void __launch_bounds__(kThreads, (kFullBlocks<Rule, T>))
    full_step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s) {
  __shared__ BlockShared<Rule, T, Pass::full> shared;
  step_block<Rule, T, Pass::full>(table, s, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

}  // namespace

void launch_full(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid) {
  with_rule(algorithm, [&](auto rule) {
    with_number(number, [&](auto x) {
      full_step_kernel<decltype(rule), decltype(x)><<<grid.blocks, kThreads, 0, grid.stream>>>(table, s);
      check_launch(launch_of("full_step_kernel", algorithm, table, grid));
    });
  });
}

}  // namespace dlfast::optim
