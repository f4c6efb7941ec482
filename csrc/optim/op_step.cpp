#include "optim/op_step.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <string_view>

#include "optim/cpu/step.h"
#include "optim/op_checks.h"
#include "optim/op_cuda.h"
#include "optim/op_layouts.h"
#include "optim/step.h"

namespace dlfast::optim {
namespace {

Algorithm algorithm_of(const std::string& name) {
  for (int a = 0; a < kAlgorithms; ++a) {
    if (name == kRuleNames[a]) return static_cast<Algorithm>(a);
  }
  TORCH_CHECK_VALUE(false, "there is no algorithm '", name, "'");
}

HeldTensor tensor_or_none(const py::handle& value) {
  return value.is_none() ? HeldTensor() : HeldTensor(value);
}

// Whether the tensors of `item` still are what its pointers address: `t.data = other` and swap_tensors change
// them behind their Python objects.
bool unmoved(const Item& item) {
  const at::Tensor& param = *item.param;
  const TensorRef& ref = item.ref;
  if (param.const_data_ptr() != ref.param || param.numel() != ref.numel || format_of(param) != ref.number) {
    return false;
  }
  bool in_order = param.is_non_overlapping_and_dense();
  const auto is_like_param = [&](const HeldTensor& t, const void* data, at::ScalarType dtype) {
    if (!t.defined()) return true;
    // With as many elements and dimensions, another shape has other strides.
    if (t->const_data_ptr() != data || t->scalar_type() != dtype || t->numel() != ref.numel ||
        t->dim() != param.dim()) {
      return false;
    }
    in_order = in_order && same_order(*t, param);
    return true;
  };
  for (int k = 0; k < kMaxStates; ++k) {
    if (!is_like_param(item.state[k], ref.state[k], item.state_dtype[k])) return false;
    const HeldTensor& scale = item.scale[k];
    if (!scale.defined()) continue;
    if (scale->const_data_ptr() != ref.scale[k] || scale->numel() != code_blocks(ref.numel)) return false;
  }
  if (item.step.defined()) {
    if (item.step->const_data_ptr() != ref.step) return false;
    if ((item.step->scalar_type() == at::kDouble) != ref.step_is_double) return false;
  }
  return is_like_param(item.average, ref.average, average_dtype(param)) &&
         is_like_param(item.master, ref.master, master_dtype(param)) && in_order == item.in_order;
}

// Whether `grad` is what a fast step takes as it is.
bool plain_strided(const at::Tensor& grad) {
  return grad.layout() == at::kStrided && !grad.unsafeGetTensorImpl()->is_python_dispatch();
}

// What Python says of a parameter. `key` has `entry` in optimizer.state, `formats` are "signed" or "unsigned"
// for states in code8 and None for others, `watched` the pairs of name and value that entry must go on
// holding.
Item make_item(py::object key, const py::object& param, py::object entry, const py::tuple& states,
               const py::tuple& scales, const py::tuple& formats, const py::object& average,
               const py::object& master, const py::object& step, int32_t group, uint32_t id,
               bool stochastic_param, bool stochastic_state, const py::tuple& watched) {
  Item out;
  out.key = std::move(key);
  out.param = HeldTensor(param);
  out.entry = std::move(entry);
  TORCH_CHECK(
      states.size() <= kMaxStates && scales.size() == states.size() && formats.size() == states.size(),
      "an item has at most ", kMaxStates, " states, each with a scale and a format");
  for (size_t k = 0; k < states.size(); ++k) {
    out.state[k] = HeldTensor(states[k]);
    out.scale[k] = tensor_or_none(scales[k]);
    out.state_dtype[k] = out.state[k]->scalar_type();
    out.ref.state_format[k] = format_of(*out.state[k]);
    if (!out.scale[k].defined()) continue;
    const bool is_signed = formats[k].cast<std::string>() == "signed";
    out.ref.state_format[k] = is_signed ? Format::code8_signed : Format::code8_unsigned;
  }
  out.average = tensor_or_none(average);
  out.master = tensor_or_none(master);
  out.step = tensor_or_none(step);
  out.ref.group = group;
  out.ref.id = id;
  out.ref.stochastic_param = stochastic_param;
  out.ref.stochastic_state = stochastic_state;
  for (const auto& each : watched) {
    const auto pair = each.cast<py::tuple>();
    out.watched.emplace_back(pair[0], pair[1]);
  }
  return out;
}

}  // namespace

std::vector<double> numbers_of(const py::list& hyper) {
  std::vector<double> numbers(hyper.size() * kMaxHyper);
  for (size_t g = 0; g < hyper.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(hyper.ptr(), static_cast<Py_ssize_t>(g));
    const Py_ssize_t count = PyTuple_Check(group) ? PyTuple_GET_SIZE(group) : kMaxHyper + 1;
    TORCH_CHECK(count <= kMaxHyper, "hyper[", g, "] must be a tuple of at most ", kMaxHyper, " numbers");
    for (Py_ssize_t i = 0; i < count; ++i) {
      numbers[g * kMaxHyper + static_cast<size_t>(i)] = PyFloat_AsDouble(PyTuple_GET_ITEM(group, i));
    }
  }
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return numbers;
}

PreparedStep::PreparedStep(const std::string& algorithm, const py::list& items, const py::list& param_lists,
                           const py::list& idle)
    : algorithm_(algorithm_of(algorithm)) {
  items_.reserve(items.size());
  for (const auto& item : items) add(item.cast<Item>());
  overlap_ = written_tensors_overlap(items_);
  for (const auto& entry : param_lists) {
    auto list = entry.cast<py::list>();
    std::vector<PyObject*> members;
    for (const auto& member : list) members.push_back(member.ptr());
    lists_.emplace_back(std::move(list), std::move(members));
  }
  for (const auto& param : idle) idle_.emplace_back(param);
}

void PreparedStep::add(Item out) {
  check_item(out, items_.size(), items_.empty() ? *out.param : *items_.front().param);

  TensorRef& ref = out.ref;
  const auto data = [](const at::Tensor& t) { return const_cast<void*>(t.const_data_ptr()); };
  ref.param = data(*out.param);
  ref.numel = out.param->numel();
  ref.number = format_of(*out.param);
  for (int k = 0; k < kMaxStates; ++k) {
    if (out.state[k].defined()) ref.state[k] = data(*out.state[k]);
    if (out.scale[k].defined()) ref.scale[k] = static_cast<float*>(data(*out.scale[k]));
  }
  if (out.average.defined()) ref.average = data(*out.average);
  if (out.master.defined()) {
    ref.master = data(*out.master);
    ref.master_kind = out.param->scalar_type() == at::kBFloat16 ? Master::low_half : Master::full;
  }
  if (out.step.defined()) {
    ref.step = data(*out.step);
    ref.step_is_double = out.step->scalar_type() == at::kDouble;
  }
  out.in_order = out.param->is_non_overlapping_and_dense();
  for_each_written(out,
                   [&](const at::Tensor& t) { out.in_order = out.in_order && same_order(t, *out.param); });
  items_.push_back(std::move(out));
}

bool PreparedStep::holds(const py::dict& states, const py::object& grads) {
  const GradientsHeld held(items_);
  return take_gradients(states, grads);
}

bool PreparedStep::take_gradients(const py::dict& states, const py::object& grads) {
  for (const auto& [list, members] : lists_) {
    if (PyList_GET_SIZE(list.ptr()) != static_cast<Py_ssize_t>(members.size())) return false;
    for (size_t i = 0; i < members.size(); ++i) {
      if (PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)) != members[i]) return false;
    }
  }
  for (const HeldTensor& param : idle_) {
    if (param->grad().defined()) return false;
  }
  const bool given = !grads.is_none();
  if (given && PyList_GET_SIZE(grads.ptr()) != static_cast<Py_ssize_t>(items_.size())) return false;
  for (size_t i = 0; i < items_.size(); ++i) {
    Item& item = items_[i];
    const at::Tensor& param = *item.param;
    if (given) {
      item.grad = py::handle(PyList_GET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i))).cast<at::Tensor>();
    } else {
      item.grad = param.grad();
    }
    const at::Tensor& grad = item.grad;
    if (!grad.defined() || !plain_strided(grad) || grad.sizes() != param.sizes() ||
        grad.scalar_type() != param.scalar_type() || grad.device() != param.device()) {
      return false;
    }
    if (!unmoved(item)) return false;
    if (item.entry.is_none()) continue;
    if (PyDict_GetItemWithError(states.ptr(), item.key.ptr()) != item.entry.ptr()) return false;
    for (const auto& [name, value] : item.watched) {
      if (PyDict_GetItemWithError(item.entry.ptr(), name.ptr()) != value.ptr()) return false;
    }
  }
  return true;
}

CpuResult PreparedStep::take(const StepOptions& options, std::vector<double> groups) {
  const int threads = at::get_num_threads();
  CpuStep step{.algorithm = algorithm_, .tensors = {}, .groups = std::move(groups), .options = options};
  const bool shared_gradients = options.zero_grad && gradients_overlap(items_);
  if (shared_gradients) step.options.zero_grad = false;
  step.tensors.reserve(items_.size());
  CpuResult result;
  if (!overlap_) {
    Layouts layouts;
    for (const Item& item : items_) step.tensors.push_back(layouts.ref(item));
    result = step_cpu(step, threads);
    if (!result.skipped) layouts.write_back();
  } else {
    // One after the other, each by what the one before has left; the norm is that of all.
    if (options.measure_norm) {
      Layouts layouts;
      for (const Item& item : items_) step.tensors.push_back(layouts.ref(item));
      result.norm = std::sqrt(squares_cpu(step, threads));
      result.skipped = options.skip_if_not_finite && !std::isfinite(result.norm);
      if (options.max_grad_norm >= 0)
        step.options.clip_factor *= clip_factor(result.norm, options.max_grad_norm);
      step.options.measure_norm = false;
    }
    for (const Item& item : items_) {
      if (result.skipped) break;
      Layouts layouts;
      step.tensors = {layouts.ref(item)};
      step_cpu(step, threads);
      layouts.write_back();
    }
  }
  if (options.zero_grad) clear_rest(items_, shared_gradients || overlap_);
  return result;
}

py::object PreparedStep::run(const py::dict& states, const py::list& hyper, const StepOptions& options,
                             const py::object& grads) {
  const GradientsHeld held(items_);
  if (!take_gradients(states, grads)) return py::none();
  CpuResult result;
  std::vector<double> groups = numbers_of(hyper);
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    result = take(options, std::move(groups));
  }
  if (!result.skipped) {
    for (const Item& item : items_) bump_versions(item);
  }
  if (options.zero_grad) {
    for (const Item& item : items_) bump_version(item.grad);
  }
  py::object norm = py::none();
  if (options.measure_norm) norm = py::cast(at::scalar_tensor(result.norm, norm_options()));
  return py::make_tuple(norm, result.skipped);
}

py::object PreparedStep::squares(const py::dict& states, const StepOptions& options,
                                 const py::object& grads) {
  const GradientsHeld held(items_);
  if (!take_gradients(states, grads)) return py::none();
  CpuStep step{.algorithm = algorithm_, .tensors = {}, .groups = {}, .options = options};
  Layouts layouts;
  for (const Item& item : items_) step.tensors.push_back(layouts.ref(item));
  return py::float_(squares_cpu(step, at::get_num_threads()));
}

// Of the gradients' type where they are all of float64, else float32, as torch.nn.utils.get_total_norm.
at::TensorOptions PreparedStep::norm_options() const {
  const bool wide = std::all_of(items_.begin(), items_.end(),
                                [](const Item& item) { return item.ref.number == Format::float64; });
  return at::TensorOptions().dtype(wide && !items_.empty() ? at::kDouble : at::kFloat);
}

void bind_step(py::module_& m) {
  py::class_<StepOptions>(m, "StepOptions")
      .def(py::init<>())
      .def_readwrite("grad_factor", &StepOptions::grad_factor)
      .def_readwrite("clip_factor", &StepOptions::clip_factor)
      .def_readwrite("max_grad_value", &StepOptions::max_grad_value)
      .def_readwrite("max_grad_norm", &StepOptions::max_grad_norm)
      .def_readwrite("average_decay", &StepOptions::average_decay)
      .def_readwrite("measure_norm", &StepOptions::measure_norm)
      .def_readwrite("skip_if_not_finite", &StepOptions::skip_if_not_finite)
      .def_readwrite("zero_grad", &StepOptions::zero_grad)
      .def_readwrite("seed", &StepOptions::seed)
      .def_readwrite("random_step", &StepOptions::random_step);
  py::class_<Item>(m, "StepItem", "A parameter of a step and what belongs to it")
      .def(py::init(&make_item), py::kw_only(), py::arg("key"), py::arg("param"), py::arg("entry"),
           py::arg("states"), py::arg("scales"), py::arg("formats"), py::arg("average"), py::arg("master"),
           py::arg("step"), py::arg("group"), py::arg("id"), py::arg("stochastic_param"),
           py::arg("stochastic_state"), py::arg("watched"));
  py::class_<PreparedStep>(m, "PreparedStep")
      .def(py::init<const std::string&, const py::list&, const py::list&, const py::list&>(),
           py::arg("algorithm"), py::arg("items"), py::arg("param_lists"), py::arg("idle"))
      .def("holds", &PreparedStep::holds)
      .def("run", &PreparedStep::run)
      .def("squares", &PreparedStep::squares);
#ifdef DLFAST_WITH_CUDA
  bind_cuda(m);
#endif
  m.def(
      "split_work",
      [](const std::vector<int64_t>& numels, int parts) {
        std::vector<std::pair<int64_t, int64_t>> out;
        for (const Position& p : split_work(numels, parts)) out.emplace_back(p.tensor, p.element);
        return out;
      },
      "Where each of `parts` threads starts in tensors of `numels` elements: (tensor, element)");
}

}  // namespace dlfast::optim
