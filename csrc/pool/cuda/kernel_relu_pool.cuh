// What the device bodies of bias + ReLU + pooling share: geometry, winner_masks, the reduction of one window.
// No Torch, no launch. The bodies are in kernel_relu_pool_forward.cuh and kernel_relu_pool_backward.cuh.
//
// A body is a struct of parameters whose run() does one thread's work. Its Index is uint32_t, where all
// tensors hold at most kNarrowIndexLimit elements, or uint64_t.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/fast_divmod.h"
#include "core/pack.h"
#include "core/portability.h"
#include "pool/params.h"

namespace dlfast {

constexpr uint32_t kThreads = 256;  // of every block; a multiple of the warp, for exchanges between lanes

// Half of what int32_t holds, so that a coordinate plus a window, or an index plus a block, cannot overflow.
#ifndef DLFAST_NARROW_INDEX_LIMIT
#define DLFAST_NARROW_INDEX_LIMIT (int64_t{1} << 30)
#endif
constexpr int64_t kNarrowIndexLimit = DLFAST_NARROW_INDEX_LIMIT;

// Which thread of which block is running.
struct Thread {
  uint32_t block;
  uint32_t index;

  template <typename Index>
  DLFAST_DEVICE Index global() const {
    return static_cast<Index>(block) * kThreads + index;
  }
};

template <typename Index>
struct Geometry {
  using Coord = std::make_signed_t<Index>;

  Coord in[2];   // H, W
  Coord out[2];  // PH, PW
  Coord size[2];
  Coord stride[2];
  Coord padding[2];
  Index channels;
  Index items;                   // as many threads have work
  FastDivmod<Index> by_grid[2];  // rows and columns of the plane of items: pooled elements, pixels or windows
  FastDivmod<Index> by_group;    // channels per pixel, counted in packs
  FastDivmod<Index> by_channels;
  FastDivmod<Index> by_stride[2];
  bool channels_last;
  bool relu;
  bool wide_winner_mask;
};

// Where an item lies. Item i is the i-th pack of its tensor in memory order.
template <typename Index>
struct Site {
  Index image;
  Index channel;
  std::make_signed_t<Index> h, w;
};

// Packs of more than one element lie along the channels: channels_last.
template <int N, typename Index>
DLFAST_DEVICE Site<Index> site_of(const Geometry<Index>& g, Index item) {
  using Coord = std::make_signed_t<Index>;
  if (N > 1 || g.channels_last) {
    const auto group = g.by_group.divide(item);
    const auto column = g.by_grid[1].divide(group.quotient);
    const auto row = g.by_grid[0].divide(column.quotient);
    return {row.quotient, group.remainder * N, static_cast<Coord>(row.remainder),
            static_cast<Coord>(column.remainder)};
  }
  const auto column = g.by_grid[1].divide(item);
  const auto row = g.by_grid[0].divide(column.quotient);
  const auto plane = g.by_channels.divide(row.quotient);
  return {plane.quotient, plane.remainder, static_cast<Coord>(row.remainder),
          static_cast<Coord>(column.remainder)};
}

// One channel of one image, as (h, w) -> element number.
template <typename Index>
struct Plane {
  Index origin;
  Index step_h;
  Index step_w;

  template <typename Coord>
  DLFAST_DEVICE Index at(Coord h, Coord w) const {
    return origin + static_cast<Index>(h) * step_h + static_cast<Index>(w) * step_w;
  }
};

template <typename Index, typename Coord>
DLFAST_DEVICE Plane<Index> plane_of(const Geometry<Index>& g, const Site<Index>& site,
                                    const Coord (&extent)[2]) {
  const auto rows = static_cast<Index>(extent[0]);
  const auto columns = static_cast<Index>(extent[1]);
  if (g.channels_last) {
    return {site.image * rows * columns * g.channels + site.channel, columns * g.channels, g.channels};
  }
  return {(site.image * g.channels + site.channel) * rows * columns, columns, 1};
}

// The part of a pooling window that lies on the plane, along one axis.
template <typename Coord>
struct Span {
  Coord origin;  // of the whole window; may be negative
  Coord begin, end;
  Coord divided_by;  // its length with the padding, without what ceil_mode adds: for the average
};

template <typename Coord, typename Index>
DLFAST_DEVICE Span<Coord> span_of(const Geometry<Index>& g, int axis, Coord position) {
  const Coord origin = position * g.stride[axis] - g.padding[axis];
  const Coord end = origin + g.size[axis];
  const Coord padded = g.in[axis] + g.padding[axis];
  return {origin, origin < 0 ? 0 : origin, end < g.in[axis] ? end : g.in[axis],
          (end < padded ? end : padded) - origin};
}

// The windows that cover a pixel, along one axis: first to last, none if last < first.
template <typename Coord>
struct Covering {
  Coord first, last;
};

template <typename Coord, typename Index>
DLFAST_DEVICE Covering<Coord> covering(const Geometry<Index>& g, int axis, Coord pixel) {
  const Coord padded = pixel + g.padding[axis];
  const auto quotient = [&](Coord n) {
    return static_cast<Coord>(g.by_stride[axis].quotient(static_cast<Index>(n)));
  };
  const Coord last = quotient(padded);
  return {padded < g.size[axis] ? 0 : quotient(padded - g.size[axis]) + 1,
          last < g.out[axis] ? last : g.out[axis] - 1};
}

// "Gradient passes" is !(x <= 0), which lets NaN through.
template <typename Acc>
DLFAST_DEVICE Acc relu_of(Acc x) {
  return x <= Acc(0) ? Acc(0) : x;
}

template <int N, typename T>
struct Bias {
  Accumulator<T> at[N];

  // bias [C], may be null; aligned for packs where N > 1.
  template <typename Index>
  DLFAST_DEVICE Bias(const T* bias, Index channel) : at{} {
    if (bias == nullptr) return;
    const Pack<T, N> pack = load_pack<N>(bias + channel);
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = widen(pack.at[i]);
  }
};

// WinnerMasks of N neighbouring pooled elements, aligned for packs.
template <int N, typename Index>
DLFAST_DEVICE void store_winner_mask(void* winner_mask, Index offset, bool wide, const int32_t (&where)[N]) {
  if (wide) {
    Pack<int32_t, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = where[i];
    store_pack<N>(static_cast<int32_t*>(winner_mask) + offset, pack);
  } else {
    Pack<uint8_t, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = static_cast<uint8_t>(where[i]);
    store_pack<N>(static_cast<uint8_t*>(winner_mask) + offset, pack);
  }
}

// kNoWinner of either width comes out as a number that no position of its windows has.
template <int N, typename Index>
DLFAST_DEVICE void load_winner_mask(const void* winner_mask, Index offset, bool wide, int32_t (&where)[N]) {
  if (wide) {
    const auto pack = load_pack<N>(static_cast<const int32_t*>(winner_mask) + offset);
#pragma unroll
    for (int i = 0; i < N; ++i) where[i] = pack.at[i];
  } else {
    const auto pack = load_pack<N>(static_cast<const uint8_t*>(winner_mask) + offset);
#pragma unroll
    for (int i = 0; i < N; ++i) where[i] = pack.at[i];
  }
}

// Bit i of the result belongs to element offset + i. N divides offset and 8, so one byte holds them all.
template <typename Index>
DLFAST_DEVICE uint32_t load_mask(const void* winner_mask, Index offset) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(winner_mask)[offset / 8]) >> (offset % 8);
}

// Writes the bits of N elements from `offset`, a multiple of N, each byte by one thread. The lanes that share
// a byte gather its bits first, so every lane of the warp must come here, with no bits if it has no element,
// and lane l must hold elements that start at N * l past a multiple of 8.
template <int N, typename Index>
DLFAST_DEVICE void store_mask(void* winner_mask, Index offset, uint32_t bits, bool has_elements) {
  static_assert(8 % N == 0);
  bits <<= offset % 8;
#pragma unroll
  for (int lanes = 1; lanes < 8 / N; lanes *= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, lanes);
  if (has_elements && offset % 8 == 0)
    static_cast<uint8_t*>(winner_mask)[offset / 8] = static_cast<uint8_t>(bits);
}

// The reduction of N windows at once, one per neighbouring element.
template <Pool kPool, typename T, int N>
struct Reduction;

template <typename T, int N>
struct Reduction<Pool::max, T, N> {
  using Acc = Accumulator<T>;
  Acc best[N];
  int32_t where[N];

  DLFAST_DEVICE explicit Reduction(int32_t first_position) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      best[i] = -static_cast<Acc>(INFINITY);
      where[i] = first_position;  // the winner where everything is -inf
    }
  }

  // The first of equals stays; a NaN replaces anything, and only a NaN replaces it.
  DLFAST_DEVICE void add(int i, Acc value, int32_t position, bool /*relu*/) {
    if (value > best[i] || value != value) {
      best[i] = value;
      where[i] = position;
    }
  }

  // ReLU commutes with the maximum, so it comes once, here.
  DLFAST_DEVICE T finish(int i, Acc /*divisor*/, bool relu) {
    if (relu && best[i] <= Acc(0)) {
      best[i] = Acc(0);
      where[i] = -1;
    }
    return narrow<T>(best[i]);
  }
};

template <typename T, int N>
struct Reduction<Pool::avg, T, N> {
  using Acc = Accumulator<T>;
  Acc sum[N];

  DLFAST_DEVICE explicit Reduction(int32_t /*first_position*/) : sum{} {}
  DLFAST_DEVICE void add(int i, Acc value, int32_t /*position*/, bool relu) {
    sum[i] += relu ? relu_of(value) : value;
  }
  DLFAST_DEVICE T finish(int i, Acc divisor, bool /*relu*/) const { return narrow<T>(sum[i] / divisor); }
};

}  // namespace dlfast
