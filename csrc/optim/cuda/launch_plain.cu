// Kernels of the plain optimizer step: the update alone.
#include "optim/cuda/kernel_step.cuh"
#include "optim/cuda/launch_kernels.cuh"

namespace dlfast::optim {
namespace {

// inspect: registers 80, static 320, holds LDG.128|LD.128 STG.128|ST.128
// inspect for (Adam|RmsProp), __(half|nv_bfloat16): registers 128
template <typename Rule, typename T>
__global__ void __launch_bounds__(kThreads, (kPlainBlocks<Rule, T>))
    plain_step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s) {
  __shared__ BlockShared<Rule, T, Pass::plain> shared;
  step_block<Rule, T, Pass::plain>(table, s, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

}  // namespace

void launch_plain(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid) {
  with_rule(algorithm, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (Rule::kMeasures) {
      launch_full(algorithm, number, table, s, grid);
    } else {
      with_number(number, [&](auto x) {
        plain_step_kernel<Rule, decltype(x)><<<grid.blocks, kThreads, 0, grid.stream>>>(table, s);
        check_launch(launch_of("plain_step_kernel", algorithm, table, grid));
      });
    }
  });
}

}  // namespace dlfast::optim
