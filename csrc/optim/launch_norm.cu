// Kernels that read before an optimizer step writes: the norm of the gradients, and the norms of each tensor
// for rules that measure.
#include "optim/kernel_step.cuh"
#include "optim/launch_kernels.h"

namespace dlfast::optim {
namespace {

// inspect: registers 64, static 1024, holds LDG.128|LD.128
template <typename T>
__global__ void __launch_bounds__(kThreads)
    grad_norm_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s, int index,
                     bool adds) {
  __shared__ SumShared shared;
  norm_block<T>(table, s, index, adds, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

// inspect: registers 128, static 1024, holds LDG.128|LD.128
template <typename Rule, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    measure_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s) {
  __shared__ BlockShared<Rule, T, Pass::measure> shared;
  step_block<Rule, T, Pass::measure>(table, s, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

// inspect: registers 64, static 1024
__global__ void __launch_bounds__(kThreads)
    trust_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s) {
  __shared__ SumShared shared;
  trust_block(table, s, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

}  // namespace

void launch_norm(Format number, const Table& table, const StepScalars& s, int index, bool adds, Grid grid) {
  with_number(number, [&](auto x) {
    grad_norm_kernel<decltype(x)><<<grid.blocks, kThreads, 0, grid.stream>>>(table, s, index, adds);
    check_step("grad_norm_kernel", grid);
  });
}

void launch_measure(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid) {
  with_rule(algorithm, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (Rule::kMeasures) {
      with_number(number, [&](auto x) {
        measure_kernel<Rule, decltype(x)><<<grid.blocks, kThreads, 0, grid.stream>>>(table, s);
        check_step("measure_kernel", grid);
      });
    }
  });
}

void launch_trust(const Table& table, const StepScalars& s, Grid grid) {
  trust_kernel<<<grid.blocks, kThreads, 0, grid.stream>>>(table, s);
  check_step("trust_kernel", grid);
}

}  // namespace dlfast::optim
