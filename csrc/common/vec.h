// A SIMD vector of N numbers, on the compiler's own vector types: one source for every level.
//
// Vec<float, 8> is one AVX register, Vec<float, 16> one AVX-512 register; the compiler splits what is
// wider than the target. `a * b + c` contracts to a fused multiply-add where the target has one.
// No Torch, no tensors.
#pragma once

#include <cstdint>
#include <cstring>

#define DLFAST_INLINE inline __attribute__((always_inline))

// What follows in the file is compiled for the level. GCC ends it with the file, clang wants the pop.
#if defined(__clang__)
#define DLFAST_TARGET_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define DLFAST_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl\"))), apply_to = function)")
#define DLFAST_TARGET_END _Pragma("clang attribute pop")
#else
#define DLFAST_TARGET_AVX2 _Pragma("GCC target(\"avx2,fma,f16c\")")
#define DLFAST_TARGET_AVX512 \
  _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512\")")
#define DLFAST_TARGET_END
#endif

namespace dlfast {

template <typename T, int N>
struct VecType {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <typename T, int N>
using Vec = typename VecType<T, N>::type;

template <typename V, typename T>
DLFAST_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
DLFAST_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <typename V, typename T>
DLFAST_INLINE V broadcast(T x) {
  return V{} + x;
}

}  // namespace dlfast
