// A SIMD vector of N numbers, on the compiler's own vector types: one source for every level.
//
// Vec<float, 8> is one AVX register, Vec<float, 16> one AVX-512 register; the compiler splits what is
// wider than the target. `a * b + c` contracts to a fused multiply-add where the target has one; `a < b`
// gives a vector of integers, all ones where true, that `mask ? a : b` takes.
// Include it after the target of the level is set (see simd.h). No Torch, no tensors.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define DLFAST_INLINE inline __attribute__((always_inline))
#define DLFAST_INLINE_LAMBDA __attribute__((always_inline))

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

// x - 0 is x for every x, so that nothing is left but the broadcast; x + 0 would turn -0 into 0.
template <typename V, typename T>
DLFAST_INLINE V broadcast(T x) {
  return x - V{};
}

template <typename To, typename From>
DLFAST_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Unsigned integers of another width. GCC takes eight bytes apart number by number when they are to become 32
// bits wide or come from there, but not on the way over 16 bits.
template <typename To, typename From>
DLFAST_INLINE To convert_integers(From v) {
#if !defined(__clang__)
  using U16 = Vec<uint16_t, 8>;
  if constexpr (sizeof(From) == 8 && sizeof(To) == 32) {
    using U8 = Vec<uint8_t, 16>;
    const U8 bytes = bits_as<U8>(Vec<uint64_t, 2>{bits_as<uint64_t>(v), 0});
    const U8 pairs = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    return __builtin_convertvector(bits_as<U16>(__builtin_shuffle(bytes, U8{}, pairs)), To);
  } else if constexpr (sizeof(From) == 32 && sizeof(To) == 8) {
    return __builtin_convertvector(__builtin_convertvector(v, U16), To);
  }
#endif
  return __builtin_convertvector(v, To);
}

// Both compilers' name for the elements of a and, from N on, of b at constant places.
#if defined(__clang__)
#define DLFAST_SHUFFLE(a, b, places) __builtin_shufflevector(a, b, places)
#else
#define DLFAST_SHUFFLE(a, b, places) __builtin_shuffle(a, b, decltype(a < b){places})
#endif

// One step of a transpose: squares of STEP rows and columns change places across the diagonal.
template <int STEP, typename V, int N, int... J>
DLFAST_INLINE void exchange_squares(V (&rows)[N], std::integer_sequence<int, J...>) {
  for (int i = 0; i < N; ++i) {
    if (i & STEP) continue;
    const V a = rows[i], b = rows[i + STEP];
    rows[i] = DLFAST_SHUFFLE(a, b, ((J & STEP) ? N + J - STEP : J)...);
    rows[i + STEP] = DLFAST_SHUFFLE(a, b, ((J & STEP) ? N + J : J + STEP)...);
  }
}
#undef DLFAST_SHUFFLE

// rows[i][j] and rows[j][i] change places, N being a power of two.
template <int STEP = 1, typename V, int N>
DLFAST_INLINE void transpose(V (&rows)[N]) {
  exchange_squares<STEP>(rows, std::make_integer_sequence<int, N>{});
  if constexpr (2 * STEP < N) transpose<2 * STEP>(rows);
}

}  // namespace dlfast
