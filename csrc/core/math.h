// Whole-number arithmetic on sizes.
#pragma once

#include <cstdint>

namespace dlfast {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace dlfast
