// Kernels that read before an optimizer step writes: the norm of the gradients, and the norms of each tensor
// for rules that measure.
#include "optim/cuda/kernel_step.cuh"
#include "optim/cuda/launch_kernels.cuh"

namespace dlfast::optim {
namespace {

// 64 registers a thread. Left to itself, ptxas aims at more blocks for sm_100 and spills a few bytes.
constexpr int kNormBlocksPerSm = 4;

// inspect: registers 64, static 256, holds LDG.128|LD.128
template <typename T>
__global__ void __launch_bounds__(kThreads, kNormBlocksPerSm)
    grad_norm_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s, int index,
                     bool adds) {
  __shared__ SumShared shared;
  norm_block<T>(table, s, index, adds, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

// inspect: registers 128, static 320, holds LDG.128|LD.128
template <typename Rule, typename T>
__global__ void __launch_bounds__(kThreads, (kFullBlocks<Rule, T>))
    measure_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s) {
  __shared__ BlockShared<Rule, T, Pass::measure> shared;
  step_block<Rule, T, Pass::measure>(table, s, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

// inspect: registers 64, static 256
__global__ void __launch_bounds__(kThreads)
    trust_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars s) {
  __shared__ SumShared shared;
  trust_block(table, s, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

}  // namespace

void launch_norm(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, int index,
                 bool adds, Grid grid) {
  with_number(number, [&](auto x) {
    grad_norm_kernel<decltype(x)><<<grid.blocks, kThreads, 0, grid.stream>>>(table, s, index, adds);
    check_launch(launch_of("grad_norm_kernel", algorithm, table, grid));
  });
}

void launch_measure(Algorithm algorithm, Format number, const Table& table, const StepScalars& s, Grid grid) {
  with_rule(algorithm, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (Rule::kMeasures) {
      with_number(number, [&](auto x) {
        measure_kernel<Rule, decltype(x)><<<grid.blocks, kThreads, 0, grid.stream>>>(table, s);
        check_launch(launch_of("measure_kernel", algorithm, table, grid));
      });
    }
  });
}

void launch_trust(Algorithm algorithm, const Table& table, const StepScalars& s, Grid grid) {
  trust_kernel<<<grid.blocks, kThreads, 0, grid.stream>>>(table, s);
  check_launch(launch_of("trust_kernel", algorithm, table, grid));
}

}  // namespace dlfast::optim
