// N neighbouring numbers that a thread moves in one access of up to 16 bytes. Device code only.
#pragma once

#include "core/portability.h"

namespace dlfast {

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
};

// How many T one 16-byte access moves.
template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

template <int N, typename T>
DLFAST_DEVICE Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, typename T>
DLFAST_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Up to N elements, of which `present` exist (any number, also none or too many); zeros beyond. In packs,
// present is none or all.
template <int N, typename E>
DLFAST_DEVICE Pack<E, N> read_pack(const E* from, int present, bool in_packs) {
  Pack<E, N> pack{};
  if (present <= 0) return pack;
  if (in_packs) return load_pack<N>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < present) pack.at[i] = from[i];
  }
  return pack;
}

// Copies `count` elements to `shared`, which is 16-byte aligned, by all threads of a block and in 16-byte
// accesses whatever the alignment of `source`. Element i lands at shared[result + i], result < kPackSize<T>.
template <typename T>
DLFAST_DEVICE uint32_t stage(T* shared, const T* source, uint32_t count, uint32_t thread, uint32_t threads) {
  constexpr uint32_t n = kPackSize<T>;
  const uint32_t shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(source) / sizeof(T)) % n;
  const uint32_t end = shift + count;
  const T* aligned = source - shift;
#pragma unroll 4
  for (uint32_t first = thread * n; first < end; first += threads * n) {
    if (first >= shift && first + n <= end) {
      store_pack<n>(shared + first, load_pack<n>(aligned + first));
    } else {
      for (uint32_t i = first; i < first + n; ++i) {
        if (i >= shift && i < end) shared[i] = aligned[i];
      }
    }
  }
  return shift;
}

}  // namespace dlfast
