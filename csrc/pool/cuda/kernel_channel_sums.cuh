// Device bodies that reduce a tensor per channel. No Torch, no launch.
//
//   OverRows      [rows][C]: threads have packs of channels
//   OverPlanes    [outer][C][inner]: warps have pieces of planes
//   SumOfSplits   the sum of what the blocks of either leave, where it is one number
//
// What is reduced, and how, is said by elements such as Passing: a State of N neighbours, in rows of a
// channel each, in planes all of one; begin(), add() and at the end a Total of each, of which any two can be
// joined. Every sum is taken in an order that follows from the sizes alone.
#pragma once

#include "core/pack.h"
#include "core/portability.h"
#include "pool/params.h"

namespace dlfast::channel_sums {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;

// What the winner mask of an element is: a winner or none, in either width, or y; or there is none.
enum class WinnerMask : int32_t { narrow, wide, y, none };

// Where a pack lies: `outer` counts rows, or images, of which `at` is the first element's place in the plane.
struct Place {
  int64_t outer, at;
  int64_t offset;  // in the tensor that is walked through
  int64_t channel;
};

// A gradient where its winner mask lets it pass, for grad_bias: what an element sends through pooling and
// ReLU goes to one place of the convolution output, or nowhere, so that this sum is the one over the dense
// gradient.
template <typename T_>
struct Passing {
  using T = T_;
  using Acc = Accumulator<T>;
  using Total = Acc;
  using Left = Acc;                  // by a block
  static constexpr int kUnroll = 4;  // packs that a thread has on their way at once
  WinnerMask kind;
  const T* grad;
  const void* winner_mask;

  template <int N, bool kRows>
  struct State {
    Acc sum[N] = {};
  };
  template <int N, bool kRows>
  DLFAST_DEVICE State<N, kRows> begin(Place) const {
    return {};
  }
  template <int N, bool kRows>
  DLFAST_DEVICE void add(State<N, kRows>& s, Place place) const {
    const auto value = load_pack<N>(grad + place.offset);
    bool passes[N];
#pragma unroll
    for (int i = 0; i < N; ++i) passes[i] = true;
    if (kind == WinnerMask::narrow) {
      const auto at = load_pack<N>(static_cast<const uint8_t*>(winner_mask) + place.offset);
#pragma unroll
      for (int i = 0; i < N; ++i) passes[i] = at.at[i] != kNoWinner<uint8_t>;
    } else if (kind == WinnerMask::wide) {
      const auto at = load_pack<N>(static_cast<const int32_t*>(winner_mask) + place.offset);
#pragma unroll
      for (int i = 0; i < N; ++i) passes[i] = at.at[i] != kNoWinner<int32_t>;
    } else if (kind == WinnerMask::y) {
      const auto at = load_pack<N>(static_cast<const T*>(winner_mask) + place.offset);
#pragma unroll
      for (int i = 0; i < N; ++i) passes[i] = !(widen(at.at[i]) <= 0);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (passes[i]) s.sum[i] += widen(value.at[i]);
    }
  }
  template <int N, bool kRows>
  DLFAST_DEVICE Total total(const State<N, kRows>& s, int i, int32_t /*count*/) const {
    return s.sum[i];
  }
  DLFAST_DEVICE static Total joined(Total a, int32_t, Total b, int32_t) { return a + b; }
  DLFAST_DEVICE static Left left(Total total, int32_t /*count*/) { return total; }
};

// Of a block that joins `packs` totals at a time.
template <typename Elements>
constexpr int64_t shared_bytes(int64_t packs) {
  return kThreads * static_cast<int64_t>(packs * sizeof(typename Elements::Total) + sizeof(int32_t));
}

// The totals of N channels of all threads that share them, which are `step` apart, joined in the first of
// them. Gives the count of elements behind each.
template <typename Elements, int N>
DLFAST_DEVICE int32_t join_block(typename Elements::Total (&mine)[N], int32_t count, int32_t thread,
                                 int32_t step, void* shared) {
  auto* totals = static_cast<typename Elements::Total*>(shared);  // [N][kThreads]
  auto* counts = reinterpret_cast<int32_t*>(totals + N * kThreads);
  for (int32_t distance = kThreads / 2; distance >= step; distance /= 2) {
    __syncthreads();
    if (thread >= distance && thread < 2 * distance) {
#pragma unroll
      for (int i = 0; i < N; ++i) totals[i * kThreads + thread] = mine[i];
      counts[thread] = count;
    }
    __syncthreads();
    if (thread >= distance) continue;
    const int32_t other = counts[thread + distance];
    if (other == 0) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto theirs = totals[i * kThreads + thread + distance];
      mine[i] = count == 0 ? theirs : Elements::joined(mine[i], count, theirs, other);
    }
    count += other;
  }
  return count;
}

// Blocks: channel groups, then splits of the rows.
template <typename Elements, int N>
struct OverRows {
  using T = typename Elements::T;
  static constexpr int64_t kShared = shared_bytes<Elements>(N);
  Elements elements;
  int64_t rows, channels;
  int32_t groups, packs;  // channel groups, and packs in each: a power of two that divides kThreads
  int32_t splits;
  typename Elements::Left* partial;  // [splits][C]

  DLFAST_DEVICE void run(uint32_t block, int32_t thread, void* shared) const {
    const int64_t group = block % static_cast<uint32_t>(groups),
                  split = block / static_cast<uint32_t>(groups);
    const int64_t channel = (group * packs + thread % packs) * N;
    const int32_t step = kThreads / packs;
    const int64_t begin = rows * split / splits + thread / packs, end = rows * (split + 1) / splits;
    typename Elements::Total mine[N] = {};
    int32_t count = 0;
    if (channel < channels && begin < end) {
      const auto place = [&](int64_t row) {
        return Place{.outer = row, .at = 0, .offset = row * channels + channel, .channel = channel};
      };
      auto state = elements.template begin<N, true>(place(begin));
#pragma unroll(Elements::kUnroll)
      for (int64_t row = begin; row < end; row += step) elements.add(state, place(row));
      count = static_cast<int32_t>((end - begin + step - 1) / step);
#pragma unroll
      for (int i = 0; i < N; ++i) mine[i] = elements.total(state, i, count);
    }
    count = join_block<Elements, N>(mine, count, thread, packs, shared);
    if (thread >= packs || channel >= channels) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      partial[split * channels + channel + i] = Elements::left(mine[i], count);
    }
  }
};

// Blocks: channels, then splits of the pieces. Piece i is the (i % pieces)-th of plane i / pieces. All
// pieces of a channel are numbered by 32 bits, whose division is cheap.
template <typename Elements, int N>
struct OverPlanes {
  using T = typename Elements::T;
  static constexpr int64_t kShared = shared_bytes<Elements>(1);
  Elements elements;
  int64_t inner, piece;              // elements of a plane and of a piece, the latter a multiple of N
  uint32_t channels, pieces;         // pieces: of a plane
  uint32_t all, per_split;           // pieces: of a channel, and of a split of them
  typename Elements::Left* partial;  // [splits][C]

  DLFAST_DEVICE void run(uint32_t block, int32_t thread, void* shared) const {
    const uint32_t split = block / channels, channel = block - split * channels;
    const uint32_t begin_piece = split * per_split + static_cast<uint32_t>(thread) / 32;
    const uint32_t end_piece = min((split + 1) * per_split, all);
    typename Elements::template State<N, false> state;
    int32_t count = 0;
    for (uint32_t i = begin_piece; i < end_piece; i += kWarps) {
      const uint32_t plane = i / pieces;
      const int64_t begin = (i - plane * pieces) * piece;
      const int64_t end = begin + piece < inner ? begin + piece : inner;
      const int64_t origin = (int64_t{plane} * channels + channel) * inner;
      const auto place = [&](int64_t at) {
        return Place{.outer = plane, .at = at, .offset = origin + at, .channel = channel};
      };
      const int64_t first = begin + thread % 32 * N;
      if (first >= end) continue;
      if (count == 0) state = elements.template begin<N, false>(place(first));
#pragma unroll(Elements::kUnroll)
      for (int64_t at = first; at < end; at += 32 * N) elements.add(state, place(at));
      count += static_cast<int32_t>((end - first + 32 * N - 1) / (32 * N));
    }
    typename Elements::Total mine[1] = {};
    if (count > 0) {
      mine[0] = elements.total(state, 0, count);
#pragma unroll
      for (int i = 1; i < N; ++i) {
        mine[0] = Elements::joined(mine[0], i * count, elements.total(state, i, count), count);
      }
    }
    count = join_block<Elements, 1>(mine, N * count, thread, 1, shared);
    if (thread == 0) partial[int64_t{split} * channels + channel] = Elements::left(mine[0], count);
  }
};

// result [count] from partial [splits][pitch]: a block has 32 neighbouring sums, its warps take turns with
// the splits. What comes after the first `count` goes to `second`, as many as `second_count`.
template <typename T_>
struct SumOfSplits {
  using T = T_;
  using Acc = Accumulator<T>;
  static constexpr int64_t kShared = kThreads * sizeof(Acc);
  int64_t count, second_count;
  int64_t pitch;
  int32_t splits;
  const Acc* partial;
  T* result;
  T* second;

  DLFAST_DEVICE void run(uint32_t block, int32_t thread, void* shared) const {
    const int32_t lane = thread % 32, warp = thread / 32;
    const int64_t i = int64_t{block} * 32 + lane;
    const bool exists = i < count + second_count;
    Acc sum = 0;
    if (exists) {
#pragma unroll 4
      for (int32_t split = warp; split < splits; split += kWarps) sum += partial[split * pitch + i];
    }
    auto* sums = static_cast<Acc*>(shared);
    sums[thread] = sum;
    __syncthreads();
    if (warp != 0 || !exists) return;
    for (int other = 1; other < kWarps; ++other) sum += sums[other * 32 + lane];
    (i < count ? result[i] : second[i - count]) = narrow<T>(sum);
  }

  int64_t blocks() const { return (count + second_count + 31) / 32; }
};

}  // namespace dlfast::channel_sums
