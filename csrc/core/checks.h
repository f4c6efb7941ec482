// Checks of single arguments: every operator calls these before it touches memory.
// A message names the operator and the argument, what came and what is accepted.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>

#include "core/dtype.h"

namespace dlfast {

using OptionalTensor = std::optional<at::Tensor>;

inline bool is_given(const OptionalTensor& tensor) {
  return tensor && tensor->defined();
}

// A pair of ints within [least, 2^31), so that no product of a few of them overflows unnoticed.
inline void check_pair(const char* op, const char* name, at::IntArrayRef value, int64_t least) {
  TORCH_CHECK(value.size() == 2, op, ": ", name, " must be an int or a pair of ints, got ", value);
  for (const int64_t v : value) {
    TORCH_CHECK(v >= least && v <= std::numeric_limits<int32_t>::max(), op, ": ", name, " must be at least ",
                least, " and less than 2**31, got ", value);
  }
}

inline Dtype check_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": ", name,
                                  " must be float32, float64, bfloat16 or float16, got ",
                                  tensor.scalar_type());
  }
}

// `tensor` is a strided tensor on the device and of the dtype of `like`.
inline void check_alike(const char* op, const char* name, const at::Tensor& tensor, const char* like_name,
                        const at::Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the device of ", like_name, " (",
              like.device(), "), got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ",
              like_name, " (", like.scalar_type(), "), got ", tensor.scalar_type());
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, got layout ",
              tensor.layout());
}

inline void check_bias(const char* op, const OptionalTensor& bias, int64_t channels, const at::Tensor& like) {
  if (!is_given(bias)) return;
  check_alike(op, "bias", *bias, "input", like);
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, op, ": bias must have shape [", channels,
              "], one number per output channel, got ", bias->sizes());
}

inline void check_sizes(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.sizes() == sizes, op, ": ", name, " must have shape ", sizes, ", got ", tensor.sizes());
}

}  // namespace dlfast
