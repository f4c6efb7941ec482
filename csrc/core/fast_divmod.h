// Division by a number that is fixed for a whole kernel, made once on the host.
//
// FastDivmod<uint32_t> replaces the division by a multiplication and a shift; it takes numerators and
// divisors below 2^31. FastDivmod<uint64_t> divides, for the few problems whose indices need 64 bits.
#pragma once

#include <cstdint>

#include "core/portability.h"

namespace dlfast {

template <typename Index>
struct Division {
  Index quotient;
  Index remainder;
};

template <typename Index>
class FastDivmod {
 public:
  FastDivmod() = default;
  explicit FastDivmod(Index divisor) : divisor_(divisor) {}

  DLFAST_HOST_DEVICE Index quotient(Index n) const { return n / divisor_; }
  DLFAST_HOST_DEVICE Division<Index> divide(Index n) const {
    const Index q = quotient(n);
    return {q, static_cast<Index>(n - q * divisor_)};
  }

 private:
  Index divisor_ = 1;
};

// With s = ceil(log2 d), the factor m = floor(2^32 (2^s - d) / d) + 1 gives
//   n / d = (n m / 2^32 + n) / 2^s, rounded down twice.
// m < 2^32 because 2^s < 2 d, and the sum stays below 2^32 because n < 2^31.
template <>
class FastDivmod<uint32_t> {
 public:
  FastDivmod() = default;
  explicit FastDivmod(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    factor_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor) << 32) / divisor + 1);
  }

  DLFAST_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    const auto high = static_cast<uint32_t>((static_cast<uint64_t>(n) * factor_) >> 32);
    return (high + n) >> shift_;
  }
  DLFAST_HOST_DEVICE Division<uint32_t> divide(uint32_t n) const {
    const uint32_t q = quotient(n);
    return {q, n - q * divisor_};
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t factor_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace dlfast
