// A step on CUDA devices: a number of launches, never a wait, and nothing read back.
#include "optim/op_cuda.h"

#ifdef DLFAST_WITH_CUDA

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "optim/cuda/step.h"
#include "optim/op_layouts.h"
#include "optim/op_step.h"

namespace dlfast::optim {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

// StepMemory of one device, as Python fills it; see launch.h. squares is float64 with one element for each
// step on the device; other devices' sums may be appended before the update.
struct DLFAST_HIDDEN DeviceMemory {
  MaybeTensor grad_scale, found_inf, arrived, hyper, squares, random_steps, last_norm, norm, skipped;
};

struct DLFAST_HIDDEN StepRun {
  PreparedStep* prepared;
  DeviceMemory* memory;
  at::Device device;
  int index = 0;     // among the steps of its device
  bool last = true;  // of its device
  bool first;        // of all: the one that tells norm and skipped
  Layouts layouts = {};
  CudaStep step = {};
  at::Tensor table = {};  // what the launches read; PyTorch keeps freed memory for the stream
  at::Tensor workspace = {};
};

template <typename T>
T* pointer(const char* name, const MaybeTensor& t, at::ScalarType dtype, int64_t numel, at::Device device) {
  if (!t || !t->defined()) return nullptr;
  TORCH_CHECK(t->numel() == numel && t->scalar_type() == dtype && t->device() == device && t->is_contiguous(),
              name, " must be ", numel, " of ", dtype, " on ", device, ", got ", t->scalar_type(),
              " of shape ", t->sizes(), " on ", t->device());
  return static_cast<T*>(const_cast<void*>(t->const_data_ptr()));
}

StepScalars scalars_of(const StepRun& run, const StepOptions& options) {
  const DeviceMemory& m = *run.memory;
  StepScalars s{.options = options, .memory = {}};
  s.memory.grad_scale = pointer<float>("grad_scale", m.grad_scale, at::kFloat, 1, run.device);
  s.memory.found_inf = pointer<float>("found_inf", m.found_inf, at::kFloat, 1, run.device);
  s.memory.arrived = pointer<unsigned>("arrived", m.arrived, at::kInt, 1, run.device);
  s.memory.random_steps = pointer<int64_t>("random_steps", m.random_steps, at::kLong, 1, run.device);
  s.memory.last_norm = pointer<double>("last_norm", m.last_norm, at::kDouble, 1, run.device);
  if (m.squares) {
    s.squares_count = static_cast<int32_t>(m.squares->numel());
    s.memory.squares = pointer<double>("squares", m.squares, at::kDouble, s.squares_count, run.device);
  }
  if (run.first && m.norm) {
    s.norm_is_double = m.norm->scalar_type() == at::kDouble;
    s.memory.norm = pointer<void>("norm", m.norm, s.norm_is_double ? at::kDouble : at::kFloat, 1, run.device);
    TORCH_CHECK(s.memory.last_norm != nullptr, "norm needs last_norm");
  }
  if (run.first) s.memory.skipped = pointer<float>("skipped", m.skipped, at::kFloat, 1, run.device);
  s.last_launch = run.last;
  TORCH_CHECK(s.memory.arrived != nullptr, "arrived is needed");
  return s;
}

at::Tensor doubles(int64_t count, at::Device device) {
  return at::empty({count}, at::TensorOptions().dtype(at::kDouble).device(device));
}

// The tensors [first, last) of a step, ready for launches on the current stream.
void take_tensors(StepRun& run, size_t first, size_t last) {
  run.layouts = Layouts();
  run.step.tensors.clear();
  for (size_t i = first; i < last; ++i) run.step.tensors.push_back(run.layouts.ref(run.prepared->items()[i]));
  run.table = at::Tensor();
  run.step.far_table = nullptr;
  if (!needs_far_table(run.step)) return;
  const auto bytes = static_cast<int64_t>(far_table_bytes(run.step));
  // PyTorch keeps the pinned memory until the copy is done.
  const auto host = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  fill_far_table(run.step, host.mutable_data_ptr());
  run.table = host.to(run.device, /*non_blocking=*/true);
  run.step.far_table = run.table.const_data_ptr();
}

void measure(StepRun& run, const StepOptions& options) {
  const c10::DeviceGuard guard(run.device);
  take_tensors(run, 0, run.prepared->items().size());
  run.step.scalars = scalars_of(run, options);
  TORCH_CHECK(run.index < run.step.scalars.squares_count, "squares needs an element for each step");
  run.workspace = doubles(parts_of_norm(run.step), run.device);
  run.step.scalars.memory.parts = run.workspace.mutable_data_ptr<double>();
  norm_cuda(run.step, run.index);
}

void launch_step(StepRun& run) {
  const int64_t parts = parts_of_step(run.step);
  if (parts > 0) {
    run.workspace = doubles(parts + trusts_of_step(run.step), run.device);
    run.step.scalars.memory.parts = run.workspace.mutable_data_ptr<double>();
    run.step.scalars.memory.trust = run.step.scalars.memory.parts + parts;
  }
  step_cuda(run.step);
  run.layouts.write_back();
}

void update(StepRun& run, StepOptions options) {
  const c10::DeviceGuard guard(run.device);
  const std::vector<Item>& items = run.prepared->items();
  const bool overlap = run.prepared->overlap();
  const bool zeroes = options.zero_grad;
  const bool zeroes_at_end = zeroes && (overlap || gradients_overlap(items));
  options.zero_grad = zeroes && !zeroes_at_end;
  if (!overlap) {
    if (run.step.tensors.empty()) take_tensors(run, 0, items.size());
    run.step.scalars = scalars_of(run, options);
    launch_step(run);
  } else {
    // One after the other, each by what the one before has left.
    const StepScalars all = scalars_of(run, options);
    for (size_t i = 0; i < items.size(); ++i) {
      take_tensors(run, i, i + 1);
      run.step.scalars = all;
      run.step.scalars.last_launch = all.last_launch && i + 1 == items.size();
      if (i > 0) run.step.scalars.memory.norm = run.step.scalars.memory.skipped = nullptr;
      launch_step(run);
    }
  }
  if (zeroes) clear_rest(items, zeroes_at_end);
}

// Takes the step of all `steps`; false, before anything has changed, where one of them no longer holds.
// `grads` and `memories` have an element for each; steps of one device share a DeviceMemory. `exchange` is
// called, if not None, once the squares of all gradients are on their way, to add those of other processes
// and devices to the memories.
bool run_cuda(const py::list& steps, const py::list& grads, const py::list& memories, const py::dict& states,
              const py::list& hyper, const StepOptions& options, const py::object& exchange) {
  const size_t count = steps.size();
  TORCH_CHECK(grads.size() == count && memories.size() == count,
              "steps, grads and memories differ in length");
  std::vector<StepRun> runs;
  std::vector<std::unique_ptr<GradientsHeld>> held;
  for (size_t i = 0; i < count; ++i) {
    PreparedStep& prepared = steps[i].cast<PreparedStep&>();
    held.push_back(std::make_unique<GradientsHeld>(prepared.items()));
    if (!prepared.take_gradients(states, grads[i])) return false;
    StepRun run{.prepared = &prepared,
                .memory = &memories[i].cast<DeviceMemory&>(),
                .device = prepared.items().front().param->device(),
                .first = i == 0};
    for (StepRun& before : runs) {
      if (before.device != run.device) continue;
      before.last = false;
      ++run.index;
    }
    runs.push_back(std::move(run));
  }
  for (StepRun& run : runs) {
    const at::Tensor hyper_there = run.memory->hyper.value_or(at::Tensor());
    run.step.algorithm = run.prepared->algorithm();
    run.step.number = run.prepared->items().front().ref.number;
    run.step.device_groups = pointer<double>("hyper", hyper_there, at::kDouble,
                                             static_cast<int64_t>(hyper.size()) * kMaxHyper, run.device);
    if (run.step.device_groups == nullptr) run.step.groups = numbers_of(hyper);
  }
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  if (options.measure_norm) {
    {
      const py::gil_scoped_release no_gil;
      for (StepRun& run : runs) measure(run, options);
    }
    if (!exchange.is_none()) exchange();
  }
  {
    const py::gil_scoped_release no_gil;
    for (StepRun& run : runs) update(run, options);
  }
  for (const StepRun& run : runs) {
    for (const Item& item : run.prepared->items()) {
      bump_versions(item);
      if (options.zero_grad) bump_version(item.grad);
    }
  }
  return true;
}

}  // namespace

void bind_cuda(py::module_& m) {
  py::class_<DeviceMemory>(m, "DeviceMemory")
      .def(py::init<>())
      .def_readwrite("grad_scale", &DeviceMemory::grad_scale)
      .def_readwrite("found_inf", &DeviceMemory::found_inf)
      .def_readwrite("arrived", &DeviceMemory::arrived)
      .def_readwrite("hyper", &DeviceMemory::hyper)
      .def_readwrite("squares", &DeviceMemory::squares)
      .def_readwrite("random_steps", &DeviceMemory::random_steps)
      .def_readwrite("last_norm", &DeviceMemory::last_norm)
      .def_readwrite("norm", &DeviceMemory::norm)
      .def_readwrite("skipped", &DeviceMemory::skipped);
  m.def("run_cuda", &run_cuda);
  m.def(
      "place_of_unit",
      [](const std::vector<int64_t>& numels, int64_t unit) {
        const UnitPlace place = place_of_unit(numels, unit);
        return py::make_tuple(place.tensor, place.begin, place.count);
      },
      "What block `unit` of a CUDA step of tensors of `numels` elements works on: (tensor, first, count)");
}

}  // namespace dlfast::optim

#endif
