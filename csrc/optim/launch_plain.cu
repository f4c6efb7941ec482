// Kernels of the plain optimizer step: the update alone.
#include "optim/kernel_step.cuh"
#include "optim/launch_kernels.h"

namespace dlfast::optim {
namespace {

// inspect: registers 104, static 1024, holds LDG.128|LD.128 STG.128|ST.128
template <typename Rule, typename T>
__global__ void __launch_bounds__(kThreads)
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
        check_step("plain_step_kernel", grid);
      });
    }
  });
}

}  // namespace dlfast::optim
