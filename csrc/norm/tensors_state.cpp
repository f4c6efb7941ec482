#include "norm/tensors_state.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

namespace dlfast {
namespace {

constexpr int64_t kSampled = 64;
// What is compared whole: some microseconds from the second-level cache.
constexpr int64_t kWholeBytes = 64 * 1024;

// VariableVersion hides its pointer; it holds nothing else.
static_assert(sizeof(c10::VariableVersion) == sizeof(void*));

bool same_counter(const c10::VariableVersion& one, const c10::VariableVersion& other) {
  return std::memcmp(&one, &other, sizeof(void*)) == 0;
}

// Steps of about the golden section: they fall on all channels and taps alike, whatever the sizes are.
int64_t step_through(int64_t count) {
  auto step = static_cast<int64_t>(static_cast<double>(count) * 0.6180339887);
  while (std::gcd(step, count) > 1) --step;
  return step;
}

bool is_whole(const at::Tensor& tensor) {
  return static_cast<int64_t>(tensor.nbytes()) <= kWholeBytes && tensor.is_non_overlapping_and_dense();
}

// Calls `look` with the address and size of each piece of `tensor` that is compared, until it answers false.
template <typename Look>
bool each_piece(const at::Tensor& tensor, const Look& look) {
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  if (is_whole(tensor)) return look(data, tensor.nbytes());
  const int64_t count = tensor.numel(), taken = tensor.dim() == 1 ? count : std::min(count, kSampled);
  const auto item = static_cast<int64_t>(tensor.itemsize());
  const int64_t step = taken < count ? step_through(count) : 1;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int64_t i = 0, place = 0; i < taken; ++i, place = (place + step) % count) {
    int64_t rest = place, offset = 0;
    for (int64_t axis = tensor.dim() - 1; axis >= 0; --axis) {
      offset += rest % sizes[axis] * strides[axis];
      rest /= sizes[axis];
    }
    if (!look(data + offset * item, item)) return false;
  }
  return true;
}

}  // namespace

TensorsState::TensorsState(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.has_storage() && !tensor.is_inference(),
                "what is computed from a tensor without memory or versions of its own cannot be kept");
    const c10::VariableVersion& counter = tensor.unsafeGetTensorImpl()->version_counter();
    std::string numbers;
    if (tensor.is_cpu()) {
      each_piece(tensor, [&](const char* data, size_t size) {
        numbers.append(data, size);
        return true;
      });
    }
    entries_.push_back({counter, counter.current_version(), tensor.storage().getWeakStorageImpl(),
                        tensor.const_data_ptr(), tensor.scalar_type(), tensor.device(),
                        at::DimVector(tensor.sizes()), at::DimVector(tensor.strides()), std::move(numbers)});
  }
}

bool TensorsState::same(const Entry& entry, const at::Tensor& tensor) {
  const c10::VariableVersion& counter = tensor.unsafeGetTensorImpl()->version_counter();
  if (!same_counter(entry.counter, counter) || counter.current_version() != entry.version) return false;
  if (!tensor.has_storage() || tensor.storage().unsafeGetStorageImpl() != entry.storage._unsafe_get_target())
    return false;
  // A view shares counter and memory.
  if (tensor.const_data_ptr() != entry.data || tensor.scalar_type() != entry.dtype ||
      tensor.device() != entry.device || tensor.sizes() != entry.sizes || tensor.strides() != entry.strides)
    return false;
  if (!tensor.is_cpu()) return true;
  const char* numbers = entry.numbers.data();
  return each_piece(tensor, [&](const char* data, size_t size) {
    const bool equal = std::memcmp(data, numbers, size) == 0;
    numbers += size;
    return equal;
  });
}

bool TensorsState::holds(const std::vector<at::Tensor>& tensors) const {
  return tensors.size() == entries_.size() &&
         std::equal(entries_.begin(), entries_.end(), tensors.begin(), same);
}

}  // namespace dlfast
