// How an optimizer step is split into launches; the kernels are in launch_<family>.cu.
#include "optim/cuda/step.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "optim/cuda/kernel_table.cuh"
#include "optim/cuda/launch_kernels.cuh"

namespace dlfast::optim {
namespace {

Grid grid_of(int64_t blocks) {
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(),
              "params hold too many elements for one step: ", blocks, " units of ", kUnit);
  return {static_cast<unsigned>(blocks), c10::cuda::getCurrentCUDAStream()};
}

int64_t units_after(const TensorRef& last) {
  return last.first_unit + units_of(last.numel, kUnit);
}

int64_t all_units(const CudaStep& step) {
  int64_t units = 0;
  for (const TensorRef& t : step.tensors) units += units_of(t.numel, kUnit);
  return units;
}

// Calls f(table, units, is the last) for each launch: one where the table lies in device memory, else as many
// as it takes to pass all tensors, and the groups they use, in arguments.
template <typename F>
void for_launches(const CudaStep& step, F&& f) {
  Table table{};
  const auto all = static_cast<int64_t>(step.tensors.size());
  table.far_groups = reinterpret_cast<const GroupRef*>(step.device_groups);
  if (step.far_table != nullptr) {
    table.far_tensors = static_cast<const TensorRef*>(step.far_table);
    if (table.far_groups == nullptr)
      table.far_groups = reinterpret_cast<const GroupRef*>(table.far_tensors + all);
    table.count = all;
    f(table, units_after(step.tensors.back()), true);
    return;
  }
  std::vector<int> slot(step.groups.size() / kMaxHyper);
  for (size_t next = 0; next < step.tensors.size();) {
    int used = 0;
    table.count = 0;
    std::fill(slot.begin(), slot.end(), -1);
    for (; next < step.tensors.size() && table.count < kTableTensors; ++next) {
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
      table.tensors[table.count++] = t;
    }
    const int64_t units = number_units(table.tensors, table.count, kUnit);
    f(table, units, next == step.tensors.size());
  }
}

// Whether the step asks for more than the update.
bool is_plain(const CudaStep& step) {
  const StepOptions& o = step.scalars.options;
  const StepMemory& m = step.scalars.memory;
  const bool plain_step = o.max_grad_value < 0 && !o.zero_grad && step.scalars.squares_count == 0 &&
                          m.skipped == nullptr && m.random_steps == nullptr;
  return plain_step && std::all_of(step.tensors.begin(), step.tensors.end(), [](const TensorRef& t) {
           bool own_format = true;
           for (int k = 0; k < kMaxStates; ++k)
             own_format = own_format && (t.state[k] == nullptr || t.state_format[k] == t.number);
           return own_format && t.average == nullptr && t.master_kind == Master::none &&
                  !t.stochastic_param && !t.stochastic_state;
         });
}

bool measures(Algorithm algorithm) {
  return with_rule(algorithm, [](auto rule) { return decltype(rule)::kMeasures; });
}

}  // namespace

bool needs_far_table(const CudaStep& step) {
  if (step.tensors.size() <= kTableTensors && step.groups.size() <= kTableGroups * kMaxHyper) return false;
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

size_t far_table_bytes(const CudaStep& step) {
  return step.tensors.size() * sizeof(TensorRef) + step.groups.size() * sizeof(double);
}

void fill_far_table(CudaStep& step, void* host) {
  number_units(step.tensors.data(), static_cast<int64_t>(step.tensors.size()), kUnit);
  const size_t bytes = step.tensors.size() * sizeof(TensorRef);
  std::memcpy(host, step.tensors.data(), bytes);
  std::memcpy(static_cast<char*>(host) + bytes, step.groups.data(), step.groups.size() * sizeof(double));
}

int64_t parts_of_norm(const CudaStep& step) {
  return all_units(step);
}

int64_t parts_of_step(const CudaStep& step) {
  return measures(step.algorithm) ? 2 * all_units(step) : 0;
}

int64_t trusts_of_step(const CudaStep& step) {
  return measures(step.algorithm) ? static_cast<int64_t>(step.tensors.size()) : 0;
}

void norm_cuda(CudaStep& step, int index) {
  bool adds = false;
  for_launches(step, [&](const Table& table, int64_t units, bool) {
    launch_norm(step.algorithm, step.number, table, step.scalars, index, adds, grid_of(units));
    adds = true;
  });
}

void step_cuda(CudaStep& step) {
  const bool plain = is_plain(step);
  StepScalars s = step.scalars;
  const bool ends_step = s.last_launch;
  for_launches(step, [&](const Table& table, int64_t units, bool last) {
    s.last_launch = ends_step && last;
    if (measures(step.algorithm)) {
      launch_measure(step.algorithm, step.number, table, s, grid_of(units));
      launch_trust(step.algorithm, table, s, grid_of(table.count));
    }
    (plain ? launch_plain : launch_full)(step.algorithm, step.number, table, s, grid_of(units));
    s.memory.norm = nullptr;  // told once
    s.memory.skipped = nullptr;
  });
}

UnitPlace place_of_unit(const std::vector<int64_t>& numels, int64_t unit) {
  std::vector<TensorRef> tensors(numels.size());
  for (size_t i = 0; i < numels.size(); ++i) tensors[i].numel = numels[i];
  const auto count = static_cast<int64_t>(tensors.size());
  number_units(tensors.data(), count, kUnit);
  const int64_t tensor = find_tensor(tensors.data(), count, unit);
  const UnitSpan span = span_of(tensors[static_cast<size_t>(tensor)], unit);
  return {tensor, span.begin, span.count};
}

}  // namespace dlfast::optim
