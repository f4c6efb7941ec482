// From accumulators to memory: bias, activation and pooling of whole windows in registers. No Torch, no
// launch.
#pragma once

#include "conv/cuda/conv_tile.h"
#include "core/pack.h"
#include "pool/cuda/kernel_relu_pool.cuh"

namespace dlfast {

// Which output channel a column of the GEMM stands for is free. A thread holds columns 2q and 2q + 1 of every
// fragment; fragments of a group are dealt out so that these are kOwned neighbouring channels: one 16-byte
// store, and four threads side by side fill whole sectors.
template <typename T>
struct ChannelOrder {
  static constexpr int kOwned = kPackSize<T>;
  static constexpr int kFragments = kOwned / 2;  // of a group
  static constexpr int kGroup = 8 * kFragments;  // channels

  // The column that channel `c` of a block has.
  static DLFAST_DEVICE int column(int c) {
    const int in_group = c % kGroup;
    const int owner = in_group / kOwned, fragment = in_group % kOwned / 2;
    return c - in_group + 8 * fragment + 2 * owner + in_group % 2;
  }
};

template <typename T>
struct ConvFinish {
  const T* bias;         // [K] or null
  T* y;                  // [N, PH, PW, K]
  uint8_t* winner_mask;  // the same, or null
  bool relu;
  bool packed;       // y and winner mask may be written in packs of channels
  bool bias_packed;  // and bias read

  // acc[i][j] is fragment (i, j) of the slab whose first window is (row, column); see tensor_core.h.
  template <typename W, int kRows, int kColumns>
  DLFAST_DEVICE void run(const ConvTile& t, const BlockSite& site, int row, int column, int lane,
                         const float (&acc)[kRows][kColumns][4]) const {
    using Order = ChannelOrder<T>;
    static_assert(kRows == W::fragments && kColumns % Order::kFragments == 0);
    const int window = column + lane / 4;
    if (row >= t.windows[0] || window >= t.windows[1]) return;
#pragma unroll
    for (int group = 0; group < kColumns / Order::kFragments; ++group) {
      const int channel = site.first_channel + group * Order::kGroup + lane % 4 * Order::kOwned;
      if (channel >= t.out_channels) continue;
      const int present = min(Order::kOwned, t.out_channels - channel);
      const auto add = read_pack<Order::kOwned>(bias + channel, bias == nullptr ? 0 : present, bias_packed);
      const auto value = [&](int position, int i) {
        return acc[position / 2][group * Order::kFragments + i / 2][position % 2 * 2 + i % 2] +
               widen(add.at[i]);
      };
      if constexpr (W::pooled) {
        Reduction<Pool::max, T, Order::kOwned> best(0);
#pragma unroll
        for (int position = 0; position < W::positions; ++position) {
          // With ceil_mode a window may hang over the end.
          const bool inside = row * W::height + position / W::width < t.out[0] &&
                              window * W::width + position % W::width < t.out[1];
          if (!inside) continue;
#pragma unroll
          for (int i = 0; i < Order::kOwned; ++i) best.add(i, value(position, i), position, relu);
        }
        Pack<T, Order::kOwned> result;
        Pack<uint8_t, Order::kOwned> winner_masks;
#pragma unroll
        for (int i = 0; i < Order::kOwned; ++i) {
          result.at[i] = best.finish(i, 1.0f, relu);
          winner_masks.at[i] = static_cast<uint8_t>(best.where[i]);
        }
        const int64_t at =
            ((site.image * t.windows[0] + row) * t.windows[1] + window) * t.out_channels + channel;
        write(y + at, result, present);
        if (winner_mask != nullptr) write(winner_mask + at, winner_masks, present);
      } else {
#pragma unroll
        for (int position = 0; position < W::positions; ++position) {
          const int z_row = row * W::height + position;
          if (z_row >= t.out[0]) continue;
          Pack<T, Order::kOwned> result;
#pragma unroll
          for (int i = 0; i < Order::kOwned; ++i) {
            const float x = value(position, i);
            result.at[i] = narrow<T>(relu ? relu_of(x) : x);
          }
          const int64_t at = ((site.image * t.out[0] + z_row) * t.out[1] + window) * t.out_channels + channel;
          write(y + at, result, present);
        }
      }
    }
  }

 private:
  template <typename E, int N>
  DLFAST_DEVICE void write(E* to, const Pack<E, N>& pack, int present) const {
    if (packed) {
      store_pack<N>(to, pack);
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < present) to[i] = pack.at[i];
    }
  }
};

}  // namespace dlfast
