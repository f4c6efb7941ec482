// Device bodies that sum a gradient per channel, for grad_bias: what an element sends through pooling and
// ReLU goes to one place of the convolution output, or nowhere, so that the sum over the pooled gradient,
// where its code lets it pass, is the sum over the dense one. No Torch, no launch.
//
//   SumChannelsLast   [rows][C]: threads have packs of channels
//   SumPlanes         [outer][C][inner]: warps have pieces of planes
//   SumOfSplits       the sum of what the blocks of either leave
//
// Every sum is taken in an order that follows from the sizes alone.
#pragma once

#include "common/pack.h"
#include "common/portability.h"
#include "conv_relu_pool/params.h"

namespace dlfast::channel_sums {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;

// What the code of an element is: a winner or none, in either width, or y; or there is none.
enum class Code : int32_t { narrow, wide, y, none };

// Sums of N neighbours, which `sum` has so far.
template <int N, typename T>
DLFAST_DEVICE void add_passing(Accumulator<T> (&sum)[N], const T* grad, const void* code, Code kind,
                               int64_t offset) {
  const auto value = load_pack<N>(grad + offset);
  bool passes[N];
#pragma unroll
  for (int i = 0; i < N; ++i) passes[i] = true;
  if (kind == Code::narrow) {
    const auto at = load_pack<N>(static_cast<const uint8_t*>(code) + offset);
#pragma unroll
    for (int i = 0; i < N; ++i) passes[i] = at.at[i] != kNoWinner<uint8_t>;
  } else if (kind == Code::wide) {
    const auto at = load_pack<N>(static_cast<const int32_t*>(code) + offset);
#pragma unroll
    for (int i = 0; i < N; ++i) passes[i] = at.at[i] != kNoWinner<int32_t>;
  } else if (kind == Code::y) {
    const auto at = load_pack<N>(static_cast<const T*>(code) + offset);
#pragma unroll
    for (int i = 0; i < N; ++i) passes[i] = !(widen(at.at[i]) <= 0);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (passes[i]) sum[i] += widen(value.at[i]);
  }
}

// Blocks: channel groups, then splits of the rows.
template <typename T_, int N>
struct SumChannelsLast {
  using T = T_;
  using Acc = Accumulator<T>;
  int64_t rows, channels;
  int32_t groups, packs;  // channel groups, and packs in each: a power of two that divides kThreads
  int32_t splits;
  Code kind;
  const T* grad;
  const void* code;
  Acc* partial;  // [splits][C]

  DLFAST_DEVICE void run(uint32_t block, int32_t thread, void* shared) const {
    const int64_t group = block % static_cast<uint32_t>(groups),
                  split = block / static_cast<uint32_t>(groups);
    const int64_t channel = (group * packs + thread % packs) * N;
    const int32_t step = kThreads / packs;
    const int64_t end = rows * (split + 1) / splits;
    Acc sum[N] = {};
    if (channel < channels) {
#pragma unroll 4
      for (int64_t row = rows * split / splits + thread / packs; row < end; row += step) {
        add_passing<N>(sum, grad, code, kind, row * channels + channel);
      }
    }
    auto* sums = static_cast<Acc*>(shared);  // [N][kThreads]
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i * kThreads + thread] = sum[i];
    __syncthreads();
    if (thread >= packs || channel >= channels) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      for (int32_t other = thread + packs; other < kThreads; other += packs)
        sum[i] += sums[i * kThreads + other];
      partial[split * channels + channel + i] = sum[i];
    }
  }
};

// Blocks: channels, then splits of the pieces. Piece i is the (i % pieces)-th of plane i / pieces. All
// pieces of a channel are numbered by 32 bits, whose division is cheap.
template <typename T_, int N>
struct SumPlanes {
  using T = T_;
  using Acc = Accumulator<T>;
  int64_t inner, piece;       // elements of a plane and of a piece, the latter a multiple of N
  uint32_t channels, pieces;  // pieces: of a plane
  uint32_t all, per_split;    // pieces: of a channel, and of a split of them
  Code kind;
  const T* grad;
  const void* code;
  Acc* partial;  // [splits][C]

  DLFAST_DEVICE void run(uint32_t block, int32_t thread, void* shared) const {
    const uint32_t split = block / channels, channel = block - split * channels;
    const uint32_t begin_piece = split * per_split + static_cast<uint32_t>(thread) / 32;
    const uint32_t end_piece = min((split + 1) * per_split, all);
    Acc sum[N] = {};
    for (uint32_t i = begin_piece; i < end_piece; i += kWarps) {
      const uint32_t plane = i / pieces;
      const int64_t begin = (i - plane * pieces) * piece;
      const int64_t end = begin + piece < inner ? begin + piece : inner;
      const int64_t origin = (int64_t{plane} * channels + channel) * inner;
#pragma unroll 4
      for (int64_t at = begin + thread % 32 * N; at < end; at += 32 * N) {
        add_passing<N>(sum, grad, code, kind, origin + at);
      }
    }
    for (int i = 1; i < N; ++i) sum[0] += sum[i];
    auto* sums = static_cast<Acc*>(shared);
    sums[thread] = sum[0];
    for (int32_t half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) sums[thread] += sums[thread + half];
    }
    if (thread == 0) partial[int64_t{split} * channels + channel] = sums[0];
  }
};

// result [count] from partial [splits][pitch]: a block has 32 neighbouring sums, its warps take turns with
// the splits. What comes after the first `count` goes to `second`, as many as `second_count`.
template <typename T_>
struct SumOfSplits {
  using T = T_;
  using Acc = Accumulator<T>;
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
