#include "optim/op_checks.h"

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

std::string name_of(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

void check_like_param(const at::Tensor& t, const at::Tensor& param, at::ScalarType dtype, const char* list,
                      size_t i) {
  TORCH_CHECK(t.layout() == at::kStrided, name_of(list, i), " is sparse (layout ", t.layout(),
              "); only strided tensors are supported");
  TORCH_CHECK(t.sizes() == param.sizes(), name_of(list, i), " has shape ", t.sizes(), ", but params[", i,
              "] has ", param.sizes());
  TORCH_CHECK(t.scalar_type() == dtype, name_of(list, i), " has dtype ", t.scalar_type(), ", but params[", i,
              "] of dtype ", param.scalar_type(), " needs ", dtype);
  TORCH_CHECK(t.device() == param.device(), name_of(list, i), " is on ", t.device(), ", but params[", i,
              "] is on ", param.device());
  TORCH_CHECK(!overlaps_itself(t), name_of(list, i),
              " overlaps itself in memory (expanded?); clone it first");
}

using Range = std::pair<const char*, const char*>;  // first byte, one past the last

void add_range(std::vector<Range>& ranges, const at::Tensor& t) {
  if (t.numel() == 0) return;
  int64_t reach = 1;
  for (int64_t d = 0; d < t.dim(); ++d) reach += t.stride(d) * (t.size(d) - 1);
  const auto* begin = static_cast<const char*>(t.const_data_ptr());
  ranges.emplace_back(begin, begin + reach * t.element_size());
}

bool any_overlap(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  return false;
}

constexpr const char* kStateNames[kMaxStates] = {"states0", "states1", "states2"};

}  // namespace

void check_item(const Item& item, size_t i, const at::Tensor& first) {
  const at::Tensor& param = *item.param;
  TORCH_CHECK(param.layout() == at::kStrided, name_of("params", i), " is sparse (layout ", param.layout(),
              "); only strided tensors are supported");
  const auto dtype = param.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
              name_of("params", i), " has dtype ", dtype,
              "; float32, float64, bfloat16 and float16 are supported");
  TORCH_CHECK(param.device() == first.device(), "all params must be on one device; params[0] is on ",
              first.device(), ", ", name_of("params", i), " on ", param.device());
  TORCH_CHECK(!overlaps_itself(param), name_of("params", i), " of shape ", param.sizes(), " and strides ",
              param.strides(), " overlaps itself in memory (expanded?); clone it first");
  const bool wide = dtype == at::kDouble;
  for (int k = 0; k < kMaxStates; ++k) {
    if (!item.state[k].defined()) continue;
    const at::Tensor& state = *item.state[k];
    const bool coded = item.scale[k].defined();
    const auto stored = state.scalar_type();
    const bool float_state = stored == at::kFloat || stored == at::kBFloat16 || stored == dtype;
    TORCH_CHECK(coded ? stored == at::kByte && !wide : (wide ? stored == dtype : float_state),
                name_of(kStateNames[k], i), " has dtype ", stored, ", which params[", i, "] of dtype ", dtype,
                " does not take");
    check_like_param(state, param, stored, kStateNames[k], i);
    if (!coded) continue;
    const at::Tensor& scale = *item.scale[k];
    TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.is_contiguous() &&
                    scale.numel() == code_blocks(param.numel()) && scale.device() == param.device(),
                "the scales of ", name_of(kStateNames[k], i), " must be ", code_blocks(param.numel()),
                " float32, one for each ", kCodeBlock, " numbers, got ", scale.scalar_type(), " of shape ",
                scale.sizes());
    TORCH_CHECK(param.is_non_overlapping_and_dense() && same_order(state, param), name_of("params", i),
                " of strides ", param.strides(), " and its int8 state of strides ", state.strides(),
                " do not lie in memory in one order; load the state_dict anew after changing the layout");
  }
  if (item.average.defined()) {
    check_like_param(*item.average, param, average_dtype(param), "averages", i);
  }
  if (item.master.defined()) {
    TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf, name_of("params", i), " of dtype ", dtype,
                " takes no master weights");
    check_like_param(*item.master, param, master_dtype(param), "masters", i);
  }
  if (item.step.defined()) {
    const at::Tensor& step = *item.step;
    TORCH_CHECK(step.numel() == 1, name_of("steps", i), " must have one element, got shape ", step.sizes());
    TORCH_CHECK(step.scalar_type() == at::kFloat || (step.scalar_type() == at::kDouble && param.is_cpu()),
                name_of("steps", i), " must be float32", param.is_cpu() ? " or float64" : "", ", got ",
                step.scalar_type());
    TORCH_CHECK(step.device() == param.device(), name_of("steps", i), " is on ", step.device(),
                ", but params[", i, "] is on ", param.device());
  }
}

bool same_order(const at::Tensor& t, const at::Tensor& param) {
  const auto a = t.strides();
  const auto b = param.strides();
  if (a == b) return true;
  for (int64_t d = 0; d < param.dim(); ++d) {
    if (param.size(d) > 1 && a[d] != b[d]) return false;
  }
  return true;
}

bool written_tensors_overlap(const std::vector<Item>& items) {
  std::vector<Range> ranges;
  ranges.reserve(items.size() * 3);
  for (const Item& item : items) {
    for_each_written(item, [&](const at::Tensor& t) { add_range(ranges, t); });
  }
  return any_overlap(ranges);
}

bool gradients_overlap(const std::vector<Item>& items) {
  std::vector<Range> ranges;
  ranges.reserve(items.size());
  for (const Item& item : items) add_range(ranges, item.grad);
  return any_overlap(ranges);
}

Format format_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Format::float64;
    case at::kBFloat16:
      return Format::bfloat16;
    case at::kHalf:
      return Format::float16;
    default:
      return Format::float32;
  }
}

}  // namespace dlfast::optim
