#include "optim/op_tensors.h"

#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <string>
#include <utility>

namespace dlfast::optim {
namespace {

// Whether two elements may share an address: sorted by stride, each dimension must step over all the
// smaller ones together.
bool overlaps_itself(const at::Tensor& t) {
  if (t.is_non_overlapping_and_dense() || t.numel() == 0) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

// Whether the elements of both lie in memory in the same order, for a `param` without gaps.
bool same_order(const at::Tensor& t, const at::Tensor& param) {
  const auto a = t.strides();
  const auto b = param.strides();
  if (a == b) return true;
  for (int64_t d = 0; d < param.dim(); ++d) {
    if (param.size(d) > 1 && a[d] != b[d]) return false;
  }
  return true;
}

std::string name_of(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

void check_like_param(const at::Tensor& t, const at::Tensor& param, const char* list, size_t i) {
  TORCH_CHECK(t.layout() == at::kStrided, name_of(list, i), " is sparse (layout ", t.layout(),
              "); only strided tensors are supported");
  TORCH_CHECK(t.sizes() == param.sizes(), name_of(list, i), " has shape ", t.sizes(), ", but params[", i,
              "] has ", param.sizes());
  TORCH_CHECK(t.scalar_type() == param.scalar_type(), name_of(list, i), " has dtype ", t.scalar_type(),
              ", but params[", i, "] has ", param.scalar_type());
  TORCH_CHECK(t.device() == param.device(), name_of(list, i), " is on ", t.device(), ", but params[", i,
              "] is on ", param.device());
}

template <typename F>
void for_each_written(const Item& item, F&& f) {
  f(*item.param);
  for (const at::Tensor* state : item.state) {
    if (state != nullptr) f(*state);
  }
}

}  // namespace

void check_items(const std::vector<Item>& items, const char* const* state_names, int64_t groups) {
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    const at::Tensor& param = *item.param;
    const at::Tensor& first = *items.front().param;
    TORCH_CHECK(param.layout() == at::kStrided, name_of("params", i), " is sparse (layout ", param.layout(),
                "); only strided tensors are supported");
    const auto dtype = param.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                name_of("params", i), " has dtype ", dtype,
                "; float32, float64, bfloat16 and float16 are supported");
    TORCH_CHECK(dtype == first.scalar_type() && param.device() == first.device(),
                "all params must have one dtype and device; params[0] has ", first.scalar_type(), " on ",
                first.device(), ", ", name_of("params", i), " has ", dtype, " on ", param.device());
    TORCH_CHECK(!overlaps_itself(param), name_of("params", i), " of shape ", param.sizes(), " and strides ",
                param.strides(), " overlaps itself in memory (expanded?); clone it first");
    TORCH_CHECK(item.group >= 0 && item.group < groups, "groups[", i, "] is ", item.group, ", but there are ",
                groups, " groups");
    check_like_param(*item.grad, param, "grads", i);
    for (int k = 0; k < kMaxStates; ++k) {
      if (item.state[k] == nullptr) continue;
      check_like_param(*item.state[k], param, state_names[k], i);
      TORCH_CHECK(!overlaps_itself(*item.state[k]), name_of(state_names[k], i), " overlaps itself in memory");
    }
    if (item.step == nullptr) continue;
    const at::Tensor& step = *item.step;
    TORCH_CHECK(step.numel() == 1, name_of("steps", i), " must have one element, got shape ", step.sizes());
    TORCH_CHECK(step.scalar_type() == at::kFloat || (step.scalar_type() == at::kDouble && param.is_cpu()),
                name_of("steps", i), " must be float32", param.is_cpu() ? " or float64" : "", ", got ",
                step.scalar_type());
    TORCH_CHECK(step.device() == param.device(), name_of("steps", i), " is on ", step.device(),
                ", but params[", i, "] is on ", param.device());
  }
}

bool written_tensors_overlap(const std::vector<Item>& items) {
  std::vector<std::pair<const char*, const char*>> ranges;  // first byte, one past the last
  ranges.reserve(items.size() * 3);
  for (const Item& item : items) {
    for_each_written(item, [&](const at::Tensor& t) {
      if (t.numel() == 0) return;
      int64_t reach = 1;
      for (int64_t d = 0; d < t.dim(); ++d) reach += t.stride(d) * (t.size(d) - 1);
      const auto* begin = static_cast<const char*>(t.const_data_ptr());
      ranges.emplace_back(begin, begin + reach * t.element_size());
    });
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  return false;
}

void bump_versions(const std::vector<Item>& items) {
  const auto bump = [](const at::Tensor& t) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  };
  for (const Item& item : items) {
    for_each_written(item, bump);
    if (item.step != nullptr) bump(*item.step);
  }
}

Number number_of(const at::Tensor& param) {
  switch (param.scalar_type()) {
    case at::kDouble:
      return Number::float64;
    case at::kBFloat16:
      return Number::bfloat16;
    case at::kHalf:
      return Number::float16;
    default:
      return Number::float32;
  }
}

TensorRef Layouts::ref(const Item& item) {
  // A parameter with gaps is stood in for by a contiguous copy, whose order the others then follow.
  const at::Tensor param = item.param->is_non_overlapping_and_dense()
                               ? *item.param
                               : at::empty_like(*item.param, at::MemoryFormat::Contiguous);
  TensorRef ref{};
  ref.param = written(*item.param, param);
  if (same_order(*item.grad, param)) {
    ref.grad = item.grad->const_data_ptr();
  } else {
    held_.push_back(at::empty_like(param).copy_(*item.grad));
    ref.grad = held_.back().const_data_ptr();
  }
  for (int k = 0; k < kMaxStates; ++k) {
    if (item.state[k] != nullptr) ref.state[k] = written(*item.state[k], param);
  }
  ref.numel = param.numel();
  ref.group = static_cast<int32_t>(item.group);
  return ref;
}

void* Layouts::written(const at::Tensor& tensor, const at::Tensor& param) {
  if (same_order(tensor, param)) return tensor.mutable_data_ptr();
  at::Tensor copy = at::empty_like(param).copy_(tensor);
  back_.emplace_back(tensor, copy);
  return copy.mutable_data_ptr();
}

void Layouts::write_back() {
  for (auto& [to, from] : back_) to.copy_(from);
  back_.clear();
  held_.clear();
}

}  // namespace dlfast::optim
