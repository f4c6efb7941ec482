// Launches of the CUDA optimizer step; the bodies are in kernel_step.cuh.
#include "optim/launch.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "optim/kernel_step.cuh"

namespace dlfast::optim {
namespace {

constexpr int kTableTensors = 44;
constexpr int kTableGroups = 8;

template <typename Rule>
using Arguments = ArgumentTable<typename Rule::Group, kTableTensors, kTableGroups>;

template <typename Rule, typename T, typename Table>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars scalars) {
  __shared__ BlockShared<Rule, typename Real<T>::type> shared;
  step_block<Rule, T>(table, scalars, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

template <typename Rule, typename Table>
void launch(Number number, const Table& table, const StepScalars& scalars, int64_t units) {
  static_assert(sizeof(Table) + sizeof(StepScalars) <= 4096, "kernel arguments");
  TORCH_CHECK(units <= std::numeric_limits<int>::max(), "params hold too many elements for one step: ", units,
              " units of ", kUnit);
  const auto blocks = static_cast<unsigned>(units);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  switch (number) {
    case Number::float32:
      step_kernel<Rule, float><<<blocks, kThreads, 0, stream>>>(table, scalars);
      break;
    case Number::float64:
      step_kernel<Rule, double><<<blocks, kThreads, 0, stream>>>(table, scalars);
      break;
    case Number::bfloat16:
      step_kernel<Rule, __nv_bfloat16><<<blocks, kThreads, 0, stream>>>(table, scalars);
      break;
    case Number::float16:
      step_kernel<Rule, __half><<<blocks, kThreads, 0, stream>>>(table, scalars);
      break;
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// As many launches as it takes to pass all tensors, and the groups they use, in arguments.
template <typename Rule>
void launch_from_arguments(const CudaStep& step, const std::vector<typename Rule::Group>& groups,
                           StepScalars scalars) {
  std::vector<int> slot(groups.size(), -1);
  for (size_t next = 0; next < step.tensors.size();) {
    Arguments<Rule> table{};
    int tensors = 0;
    int used = 0;
    std::fill(slot.begin(), slot.end(), -1);
    for (; next < step.tensors.size() && tensors < kTableTensors; ++next) {
      TensorRef t = step.tensors[next];
      int& s = slot[static_cast<size_t>(t.group)];
      if (s < 0) {
        if (used == kTableGroups) break;
        s = used++;
        table.groups[s] = groups[static_cast<size_t>(t.group)];
      }
      t.group = s;
      table.tensors[tensors++] = t;
    }
    scalars.count = tensors;
    launch<Rule>(step.number, table, scalars, number_units(table.tensors, tensors, kUnit));
  }
}

}  // namespace

bool needs_memory_table(size_t tensors, size_t groups) {
  if (tensors <= kTableTensors && groups <= kTableGroups) return false;
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

template <typename Rule>
void fill_memory_table(CudaStep& step, const std::vector<typename Rule::Group>& groups, void* host) {
  number_units(step.tensors.data(), static_cast<int64_t>(step.tensors.size()), kUnit);
  const size_t bytes = step.tensors.size() * sizeof(TensorRef);
  std::memcpy(host, step.tensors.data(), bytes);
  std::memcpy(static_cast<char*>(host) + bytes, groups.data(), groups.size() * sizeof(typename Rule::Group));
}

template <typename Rule>
void step_cuda(CudaStep& step, const std::vector<typename Rule::Group>& groups, const void* memory_table) {
  using Group = typename Rule::Group;
  const auto count = static_cast<int64_t>(step.tensors.size());
  if (count == 0) return;
  const StepScalars scalars{
      .count = count, .grad_scale = step.grad_scale, .found_inf = step.found_inf, .arrived = step.arrived};
  if (memory_table == nullptr) {
    launch_from_arguments<Rule>(step, groups, scalars);
    return;
  }
  const auto* tensors = static_cast<const TensorRef*>(memory_table);
  const MemoryTable<Group> table{.tensors = tensors,
                                 .groups = reinterpret_cast<const Group*>(tensors + count)};
  const TensorRef& last = step.tensors.back();
  launch<Rule>(step.number, table, scalars, last.first_unit + units_of(last.numel, kUnit));
}

#define DLFAST_INSTANTIATE(Rule)                                                            \
  template void fill_memory_table<Rule>(CudaStep&, const std::vector<Rule::Group>&, void*); \
  template void step_cuda<Rule>(CudaStep&, const std::vector<Rule::Group>&, const void*)
DLFAST_INSTANTIATE(Sgd);
DLFAST_INSTANTIATE(Adam);
#undef DLFAST_INSTANTIATE

}  // namespace dlfast::optim
