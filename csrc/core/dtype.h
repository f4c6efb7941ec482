// The element types that kernels take.
#pragma once

#include <cstdint>

namespace dlfast {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };

inline int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

}  // namespace dlfast
