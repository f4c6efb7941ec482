// The optimizer steps as operators: from the schemas of library.cpp to step_cpu and step_cuda.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "optim/cpu_step.h"
#include "optim/op_tensors.h"
#include "optim/step.h"
#ifdef DLFAST_WITH_CUDA
#include "optim/launch.h"
#endif

namespace dlfast::optim {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using Floats = at::ArrayRef<double>;
using Bools = c10::List<bool>;

// What a step takes beside its tensors and hyper-parameters.
struct Scalars {
  const OptionalTensor& grad_scale;
  const OptionalTensor& found_inf;
  const OptionalTensor& arrived;
};

void check_count(const char* name, size_t got, size_t expected, const char* what) {
  TORCH_CHECK(got == expected, name, " must hold one entry for each ", what, ": expected ", expected,
              ", got ", got);
}

void check_scalar(const char* name, const OptionalTensor& t, const Tensor& param, at::ScalarType dtype) {
  if (!t.has_value()) return;
  TORCH_CHECK(t->numel() == 1 && t->scalar_type() == dtype && t->device() == param.device(), name,
              " must be one ", dtype, " on ", param.device(), ", got ", t->scalar_type(), " of shape ",
              t->sizes(), " on ", t->device());
}

LearningRate learning_rate(Floats lr, TensorList lr_tensors, size_t group, const Tensor& param) {
  LearningRate out{.value = lr[group], .device_value = nullptr, .device_is_double = false};
  if (lr_tensors.empty()) return out;
  const Tensor& t = lr_tensors[group];
  TORCH_CHECK(t.numel() == 1 && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble) &&
                  t.device() == param.device(),
              "lr_tensors[", group, "] must be one float32 or float64 on ", param.device(), ", got ",
              t.scalar_type(), " of shape ", t.sizes(), " on ", t.device());
  out.device_is_double = t.scalar_type() == at::kDouble;
  if (param.is_cpu()) {
    out.value = out.device_is_double ? *t.const_data_ptr<double>() : *t.const_data_ptr<float>();
  } else {
    out.device_value = t.const_data_ptr();
  }
  return out;
}

template <typename Rule>
void run_cpu(const std::vector<Item>& items, const std::vector<typename Rule::Group>& groups,
             const Scalars& scalars) {
  Layouts layouts;
  std::vector<TensorRef> tensors;
  std::vector<double> steps;
  tensors.reserve(items.size());
  steps.reserve(items.size());
  for (const Item& item : items) {
    tensors.push_back(layouts.ref(item));
    const Tensor* step = item.step;
    double taken = 0;
    if (step != nullptr) {
      taken = step->scalar_type() == at::kDouble ? *step->const_data_ptr<double>()
                                                 : *step->const_data_ptr<float>();
    }
    steps.push_back(taken + 1);
  }
  const double scale = scalars.grad_scale ? *scalars.grad_scale->const_data_ptr<float>() : 1;
  step_cpu<Rule>(number_of(*items.front().param), tensors, steps, groups, 1 / scale);
  layouts.write_back();
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].step == nullptr) continue;
    if (items[i].step->scalar_type() == at::kDouble) {
      *items[i].step->mutable_data_ptr<double>() = steps[i];
    } else {
      *items[i].step->mutable_data_ptr<float>() = static_cast<float>(steps[i]);
    }
  }
}

#ifdef DLFAST_WITH_CUDA
template <typename Rule>
void run_cuda(const std::vector<Item>& items, const std::vector<typename Rule::Group>& groups,
              const Scalars& scalars) {
  Layouts layouts;
  CudaStep step{};
  step.number = number_of(*items.front().param);
  step.tensors.reserve(items.size());
  bool counted = false;
  for (const Item& item : items) {
    step.tensors.push_back(layouts.ref(item));
    if (item.step == nullptr) continue;
    step.tensors.back().step = item.step->mutable_data_ptr<float>();
    counted = true;
  }
  if (scalars.grad_scale) step.grad_scale = scalars.grad_scale->const_data_ptr<float>();
  if (scalars.found_inf) step.found_inf = scalars.found_inf->const_data_ptr<float>();
  if (counted) {
    TORCH_CHECK(scalars.arrived.has_value(), "arrived is needed where steps are counted");
    step.arrived = reinterpret_cast<unsigned*>(scalars.arrived->mutable_data_ptr<int32_t>());
  }

  Tensor table;
  if (needs_memory_table(items.size(), groups.size())) {
    const auto bytes = static_cast<int64_t>(memory_table_bytes<Rule>(items.size(), groups.size()));
    // PyTorch keeps the pinned memory until the copy is done.
    const Tensor host = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    fill_memory_table<Rule>(step, groups, host.mutable_data_ptr());
    table = host.to(items.front().param->device(), /*non_blocking=*/true);
  }
  step_cuda<Rule>(step, groups, table.defined() ? table.const_data_ptr() : nullptr);
  layouts.write_back();
}
#endif

template <typename Rule>
void run(const std::vector<Item>& items, const char* const* state_names,
         const std::vector<typename Rule::Group>& groups, const Scalars& scalars) {
  if (items.empty()) return;
  const Tensor& param = *items.front().param;
  check_items(items, state_names, static_cast<int64_t>(groups.size()));
  check_scalar("grad_scale", scalars.grad_scale, param, at::kFloat);
  check_scalar("found_inf", scalars.found_inf, param, at::kFloat);
  check_scalar("arrived", scalars.arrived, param, at::kInt);
  if (param.is_cpu() && scalars.found_inf && *scalars.found_inf->const_data_ptr<float>() != 0) return;

  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::DeviceGuard guard(param.device());
  bump_versions(items);
  const auto one_step = [&](const std::vector<Item>& some) {
#ifdef DLFAST_WITH_CUDA
    if (!param.is_cpu()) return run_cuda<Rule>(some, groups, scalars);
#endif
    run_cpu<Rule>(some, groups, scalars);
  };
  if (!written_tensors_overlap(items)) return one_step(items);
  for (const Item& item : items) one_step({item});
}

// Hands out a list's tensors one by one, to the parameters that have one.
class Walk {
 public:
  Walk(const char* name, TensorList list) : name_(name), list_(list) {}
  const Tensor* next() {
    TORCH_CHECK(at_ < list_.size(), name_, " has only ", list_.size(), " tensors: too few");
    return &list_[at_++];
  }
  void end() const {
    TORCH_CHECK(at_ == list_.size(), name_, " has ", list_.size(), " tensors, but only ", at_, " are needed");
  }

 private:
  const char* name_;
  TensorList list_;
  size_t at_ = 0;
};

void sgd_step_(TensorList params, TensorList grads, TensorList momentum_buffers, TensorList steps,
               at::IntArrayRef groups, Floats lr, TensorList lr_tensors, Floats momentum, Floats dampening,
               Floats weight_decay, const Bools& nesterov, const Bools& maximize,
               const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
               const OptionalTensor& arrived) {
  const size_t count = lr.size();
  check_count("grads", grads.size(), params.size(), "of params");
  check_count("groups", groups.size(), params.size(), "of params");
  check_count("momentum", momentum.size(), count, "group");
  check_count("dampening", dampening.size(), count, "group");
  check_count("weight_decay", weight_decay.size(), count, "group");
  check_count("nesterov", nesterov.size(), count, "group");
  check_count("maximize", maximize.size(), count, "group");
  if (!lr_tensors.empty()) check_count("lr_tensors", lr_tensors.size(), count, "group");
  if (params.empty()) return;

  std::vector<SgdGroup> hyper;
  for (size_t g = 0; g < count; ++g) {
    hyper.push_back({.lr = learning_rate(lr, lr_tensors, g, params[0]),
                     .momentum = momentum[g],
                     .dampening = dampening[g],
                     .weight_decay = weight_decay[g],
                     .nesterov = nesterov[g],
                     .maximize = maximize[g]});
  }
  Walk buffers("momentum_buffers", momentum_buffers);
  Walk counters("steps", steps);
  std::vector<Item> items;
  items.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    Item item{.param = &params[i], .grad = &grads[i], .state = {}, .step = nullptr, .group = groups[i]};
    if (item.group >= 0 && static_cast<size_t>(item.group) < count && momentum[item.group] != 0) {
      item.state[0] = buffers.next();
      item.step = counters.next();
    }
    items.push_back(item);
  }
  buffers.end();
  counters.end();
  constexpr const char* names[kMaxStates] = {"momentum_buffers", "", ""};
  run<Sgd>(items, names, hyper, {grad_scale, found_inf, arrived});
}

void adam_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                TensorList max_exp_avg_sqs, TensorList steps, at::IntArrayRef groups, Floats lr,
                TensorList lr_tensors, Floats beta1, Floats beta2, Floats eps, Floats weight_decay,
                const Bools& amsgrad, const Bools& decoupled_weight_decay, const Bools& maximize,
                const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                const OptionalTensor& arrived) {
  const size_t count = lr.size();
  check_count("grads", grads.size(), params.size(), "of params");
  check_count("exp_avgs", exp_avgs.size(), params.size(), "of params");
  check_count("exp_avg_sqs", exp_avg_sqs.size(), params.size(), "of params");
  check_count("steps", steps.size(), params.size(), "of params");
  check_count("groups", groups.size(), params.size(), "of params");
  check_count("beta1", beta1.size(), count, "group");
  check_count("beta2", beta2.size(), count, "group");
  check_count("eps", eps.size(), count, "group");
  check_count("weight_decay", weight_decay.size(), count, "group");
  check_count("amsgrad", amsgrad.size(), count, "group");
  check_count("decoupled_weight_decay", decoupled_weight_decay.size(), count, "group");
  check_count("maximize", maximize.size(), count, "group");
  if (!lr_tensors.empty()) check_count("lr_tensors", lr_tensors.size(), count, "group");
  if (params.empty()) return;

  std::vector<AdamGroup> hyper;
  for (size_t g = 0; g < count; ++g) {
    hyper.push_back({.lr = learning_rate(lr, lr_tensors, g, params[0]),
                     .beta1 = beta1[g],
                     .beta2 = beta2[g],
                     .eps = eps[g],
                     .weight_decay = weight_decay[g],
                     .decoupled_weight_decay = decoupled_weight_decay[g],
                     .maximize = maximize[g]});
  }
  Walk max_exp_avg_sq("max_exp_avg_sqs", max_exp_avg_sqs);
  std::vector<Item> items;
  items.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    Item item{.param = &params[i],
              .grad = &grads[i],
              .state = {&exp_avgs[i], &exp_avg_sqs[i], nullptr},
              .step = &steps[i],
              .group = groups[i]};
    if (item.group >= 0 && static_cast<size_t>(item.group) < count && amsgrad[item.group]) {
      item.state[2] = max_exp_avg_sq.next();
    }
    items.push_back(item);
  }
  max_exp_avg_sq.end();
  constexpr const char* names[kMaxStates] = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
  run<Adam>(items, names, hyper, {grad_scale, found_inf, arrived});
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, CPU, m) {
  m.impl("_sgd_step_", sgd_step_);
  m.impl("_adam_step_", adam_step_);
}

#ifdef DLFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(dlfast, CUDA, m) {
  m.impl("_sgd_step_", sgd_step_);
  m.impl("_adam_step_", adam_step_);
}
#endif

// A step is no function of its inputs that could be differentiated.
TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_sgd_step_", torch::CppFunction::makeFallthrough());
  m.impl("_adam_step_", torch::CppFunction::makeFallthrough());
}

}  // namespace dlfast::optim
