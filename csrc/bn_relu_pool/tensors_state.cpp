#include "bn_relu_pool/tensors_state.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace dlfast {
namespace {

constexpr int64_t kSampled = 64;

template <typename T>
void append(std::string& state, const T& value) {
  state.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

// Steps of about the golden section: they fall on all channels and taps alike, whatever the sizes are.
int64_t step_through(int64_t count) {
  auto step = static_cast<int64_t>(static_cast<double>(count) * 0.6180339887);
  while (std::gcd(step, count) > 1) --step;
  return step;
}

void append_sample(std::string& state, const at::Tensor& tensor) {
  const int64_t count = tensor.numel(), taken = tensor.dim() == 1 ? count : std::min(count, kSampled);
  const int64_t step = taken < count ? step_through(count) : 1;
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  const auto item = static_cast<int64_t>(tensor.itemsize());
  if (taken == count && tensor.is_contiguous()) {
    state.append(data, count * item);
    return;
  }
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int64_t i = 0, place = 0; i < taken; ++i, place = (place + step) % count) {
    int64_t rest = place, offset = 0;
    for (int64_t axis = tensor.dim() - 1; axis >= 0; --axis) {
      offset += rest % sizes[axis] * strides[axis];
      rest /= sizes[axis];
    }
    state.append(data + offset * item, item);
  }
}

}  // namespace

std::string tensors_state(const std::vector<at::Tensor>& tensors) {
  std::string state;
  state.reserve(4096);
  for (const at::Tensor& tensor : tensors) {
    append(state, tensor.const_data_ptr());
    append(state, tensor._version());
    append(state, tensor.scalar_type());
    append(state, tensor.device());
    for (const int64_t size : tensor.sizes()) append(state, size);
    for (const int64_t stride : tensor.strides()) append(state, stride);
    if (tensor.is_cpu()) append_sample(state, tensor);
  }
  return state;
}

}  // namespace dlfast
