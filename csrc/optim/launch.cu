// Launches of the CUDA optimizer step; the bodies are in kernel_step.cuh.
#include "optim/launch.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/launch_check.h"
#include "optim/kernel_step.cuh"

namespace dlfast::optim {
namespace {

constexpr int kTableTensors = 28;
constexpr int kTableGroups = 8;
using Arguments = ArgumentTable<kTableTensors, kTableGroups>;

// inspect: registers 80, static 256, holds LDG.128|LD.128 STG.128|ST.128
template <typename Rule, typename T, typename Table>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepScalars scalars) {
  __shared__ BlockShared<Rule, typename Real<T>::type> shared;
  step_block<Rule, T>(table, scalars, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x), shared);
}

template <typename Rule, typename Table>
void launch(Format number, const Table& table, const StepScalars& scalars, int64_t units) {
  static_assert(sizeof(Table) + sizeof(StepScalars) <= 4096, "kernel arguments");
  TORCH_CHECK(units <= std::numeric_limits<int>::max(), "params hold too many elements for one step: ", units,
              " units of ", kUnit);
  const auto blocks = static_cast<unsigned>(units);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  switch (number) {
    case Format::float32:
      step_kernel<Rule, float><<<blocks, kThreads, 0, stream>>>(table, scalars);
      break;
    case Format::float64:
      step_kernel<Rule, double><<<blocks, kThreads, 0, stream>>>(table, scalars);
      break;
    case Format::bfloat16:
      step_kernel<Rule, __nv_bfloat16><<<blocks, kThreads, 0, stream>>>(table, scalars);
      break;
    case Format::float16:
      step_kernel<Rule, __half><<<blocks, kThreads, 0, stream>>>(table, scalars);
      break;
    default:
      TORCH_CHECK(false, "a parameter is no int8");
  }
  check_launch([&] {
    return c10::str("in step_kernel<", c10::demangle_type<Rule>(), ">, ", blocks, " blocks of ", kThreads,
                    " threads, for ", scalars.count, " tensors");
  });
}

// As many launches as it takes to pass all tensors, and the groups they use, in arguments.
template <typename Rule>
void launch_from_arguments(const CudaStep& step, StepScalars scalars) {
  std::vector<int> slot(step.groups.size() / kMaxHyper, -1);
  for (size_t next = 0; next < step.tensors.size();) {
    Arguments table{};
    int tensors = 0;
    int used = 0;
    std::fill(slot.begin(), slot.end(), -1);
    for (; next < step.tensors.size() && tensors < kTableTensors; ++next) {
      TensorRef t = step.tensors[next];
      if (step.device_groups == nullptr) {
        const auto group = static_cast<size_t>(t.group);
        int& s = slot[group];
        if (s < 0) {
          if (used == kTableGroups) break;
          s = used++;
          std::memcpy(table.groups[s].numbers, &step.groups[group * kMaxHyper], sizeof(GroupRef));
        }
        t.group = s;
      }
      table.tensors[tensors++] = t;
    }
    scalars.count = tensors;
    launch<Rule>(step.number, table, scalars, number_units(table.tensors, tensors, kUnit));
  }
}

template <typename Rule>
void step_rule(CudaStep& step, const void* memory_table) {
  const auto count = static_cast<int64_t>(step.tensors.size());
  const StepScalars scalars{.count = count,
                            .grad_scale = step.grad_scale,
                            .found_inf = step.found_inf,
                            .arrived = step.arrived,
                            .groups = reinterpret_cast<const GroupRef*>(step.device_groups)};
  if (memory_table == nullptr) {
    launch_from_arguments<Rule>(step, scalars);
    return;
  }
  const auto* tensors = static_cast<const TensorRef*>(memory_table);
  const auto* groups = reinterpret_cast<const GroupRef*>(tensors + count);
  const TensorRef& last = step.tensors.back();
  launch<Rule>(step.number, MemoryTable{.tensors = tensors, .groups = groups}, scalars,
               last.first_unit + units_of(last.numel, kUnit));
}

}  // namespace

bool needs_memory_table(const CudaStep& step) {
  if (step.tensors.size() <= kTableTensors && step.groups.size() <= kTableGroups * kMaxHyper) return false;
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

size_t memory_table_bytes(const CudaStep& step) {
  return step.tensors.size() * sizeof(TensorRef) + step.groups.size() * sizeof(double);
}

void fill_memory_table(CudaStep& step, void* host) {
  number_units(step.tensors.data(), static_cast<int64_t>(step.tensors.size()), kUnit);
  const size_t bytes = step.tensors.size() * sizeof(TensorRef);
  std::memcpy(host, step.tensors.data(), bytes);
  std::memcpy(static_cast<char*>(host) + bytes, step.groups.data(), step.groups.size() * sizeof(double));
}

void step_cuda(CudaStep& step, const void* memory_table) {
  if (step.tensors.empty()) return;
  with_rule(step.algorithm, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (Rule::kMeasures) {
      TORCH_CHECK_NOT_IMPLEMENTED(false, "this algorithm has no CUDA step");
    } else {
      step_rule<Rule>(step, memory_table);
    }
  });
}

}  // namespace dlfast::optim
