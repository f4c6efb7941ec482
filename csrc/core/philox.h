// Random numbers by counting: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011). A number depends on its counter and the key alone, so it is the same whatever the order, the
// threads or the device that draw it.
//
// V is uint32_t, or a vector of them, one counter per lane.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define DLFAST_PHILOX __host__ __device__ __forceinline__
#else
#define DLFAST_PHILOX inline __attribute__((always_inline))
#endif

namespace dlfast {

template <typename V>
struct PhiloxBlock {
  V word[4];
};

// The upper and lower half of a 64-bit product.
template <typename V>
DLFAST_PHILOX void philox_multiply(V a, uint32_t b, V& high, V& low) {
  if constexpr (std::is_integral_v<V>) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  } else {
#ifndef __CUDACC__  // which knows no vectors
    // In pairs of lanes as 64-bit numbers: that is what the multiplier of x86 takes.
    typedef uint64_t Wide __attribute__((vector_size(sizeof(V))));
    Wide pairs;
    __builtin_memcpy(&pairs, &a, sizeof(V));
    constexpr uint64_t kLow = 0xffffffffu;
    const Wide even = (pairs & kLow) * static_cast<uint64_t>(b);
    const Wide odd = (pairs >> 32) * static_cast<uint64_t>(b);
    const Wide up = (even >> 32) | (odd & ~kLow);
    const Wide down = (even & kLow) | (odd << 32);
    __builtin_memcpy(&high, &up, sizeof(V));
    __builtin_memcpy(&low, &down, sizeof(V));
#endif
  }
}

template <typename V>
DLFAST_PHILOX PhiloxBlock<V> philox(PhiloxBlock<V> counter, uint32_t key0, uint32_t key1) {
  V* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    V high0, low0, high1, low1;
    philox_multiply(c[0], 0xd2511f53u, high0, low0);
    philox_multiply(c[2], 0xcd9e8d57u, high1, low1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

}  // namespace dlfast
