// Operators of the lower precision below autocast, as its own convolutions are.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace dlfast {

// While it lives autocast casts nothing else; called, it casts an operand.
class LowerPrecision {
 public:
  explicit LowerPrecision(c10::DeviceType device)
      : device_(device),
        dtype_(at::autocast::get_autocast_dtype(device)),
        no_autocast_(at::autocast::get_autocast_dispatch_key_from_device_type(device)) {}

  at::Tensor operator()(const at::Tensor& operand) const {
    return at::autocast::cached_cast(dtype_, operand, device_);
  }
  std::optional<at::Tensor> operator()(const std::optional<at::Tensor>& operand) const {
    return operand ? std::optional<at::Tensor>((*this)(*operand)) : std::nullopt;
  }

 private:
  c10::DeviceType device_;
  at::ScalarType dtype_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

}  // namespace dlfast
