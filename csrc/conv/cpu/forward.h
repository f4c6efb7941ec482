// The fused forward: convolution, bias, ReLU and pooling, the convolution output never leaving the cache.
//
// A unit of work is a band of one image and one group of channels. Its input is packed, its convolution
// computed directly or by Winograd's method, pooled, and written in the layout and dtype of the output.
#pragma once

#include "conv/cpu/band.h"
#include "conv/cpu/copy.h"
#include "conv/cpu/direct_forward.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/strip.h"
#include "conv/cpu/winograd.h"
#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

struct ForwardWorkspace {
  int64_t weight, bias;                        // floats, of all groups, shared
  int64_t input, winograd, z, y, winner_mask;  // floats, per thread
  int64_t group_weight, group_bias, blocks;    // of one group

  ForwardWorkspace(const ConvBlockParams& p, const Bands& bands, const WinogradWorkspace& tiles,
                   bool through_tile) {
    const int64_t pooled = bands.pooled_rows * p.pool.output_size[1];
    const int64_t side = p.tile() + 2, taps = p.tile() == 1 ? p.conv.positions() : side * side;
    blocks = (p.conv.group_out() + kBlock - 1) / kBlock;
    group_weight = blocks * kBlock * taps * p.conv.group_in();
    group_bias = blocks * kBlock;
    weight = p.conv.groups * group_weight;
    bias = p.conv.groups * group_bias;
    input = whole_lines(bands.input_floats());
    winograd = p.tile() == 1 ? 0 : tiles.transformed + tiles.products;
    // All blocks of channels wait there where the tiles of a band come in parts.
    z = bands.conv_rows * bands.conv_cols * kBlock *
        (p.tile() > 1 && tiles.tiles < bands.tiles() ? blocks : 1);
    y = through_tile ? pooled * kBlock : 0;
    winner_mask = whole_lines(y / 4);  // one byte an element
  }
  int64_t per_thread() const { return input + winograd + z + y + winner_mask; }
};

// Only float32 pixels of channels can be written where they belong; all else goes through a tile.
template <typename T>
bool goes_through_tile(const ConvBlockParams& p) {
  return !p.pool.channels_last || !std::is_same_v<T, float>;
}

// The problem with as many output channels as are computed at once, and the rest in further rounds: their
// transformed weights, read for every few tiles, are to stay in a last-level cache.
ConvBlockParams one_round(const ConvBlockParams& p) {
  ConvBlockParams part = p;
  if (p.tile() == 1 || p.conv.groups > 1) return part;
  const int64_t side = p.tile() + 2, block = side * side * p.conv.in_channels * kBlock;
  const int64_t blocks = (p.conv.out_channels + kBlock - 1) / kBlock;
  const int64_t most = std::max<int64_t>(1, kWinogradWeights / block), rounds = (blocks + most - 1) / most;
  part.conv.out_channels = std::min((blocks + rounds - 1) / rounds * kBlock, p.conv.out_channels);
  return part;
}

int64_t forward_workspace(const ConvBlockParams& all, Dtype dtype, int64_t threads) {
  const ConvBlockParams p = one_round(all);
  const bool through_tile = !p.pool.channels_last || dtype != Dtype::float32;
  const Bands bands(p);
  const ForwardWorkspace sizes(p, bands, WinogradWorkspace(p, bands, threads), through_tile);
  return sizes.weight + sizes.bias + threads * sizes.per_thread();
}

// All output channels, or those of one round, of which y and winner mask name the first.
template <typename T>
struct Forward {
  const ConvBlockParams& p;
  const int64_t total;  // output channels of y
  const T* input;
  T* y;
  uint8_t* winner_mask;  // null if not wanted
  const Bands bands;
  const Taps taps;
  const WinogradWorkspace winograd;
  const ForwardWorkspace sizes;
  const bool in_registers;

  Forward(const ConvBlockParams& p_, int64_t total_, const T* input_, T* y_, uint8_t* winner_mask_)
      : p(p_),
        total(total_),
        input(input_),
        y(y_),
        winner_mask(winner_mask_),
        bands(p_),
        taps(p_, bands),
        winograd(p_, bands, at::get_num_threads()),
        sizes(p_, bands, winograd, goes_through_tile<T>(p_)),
        in_registers(p_.tile() == 1 && is_pool_2x2(p_.pool)) {}

  int64_t bands_together() const { return p.tile() == 1 ? 1 : winograd.together; }
  int64_t units() const {
    const int64_t all = p.conv.batch * bands.per_image, together = bands_together();
    return (all + together - 1) / together * p.conv.groups;
  }

  // Some bands of one group; false where Winograd's sums overflow.
  bool unit(int64_t index, const float* weights, const float* biases, float* workspace) const {
    const int64_t group = index % p.conv.groups, first = index / p.conv.groups * bands_together();
    const int64_t last = std::min(first + bands_together(), p.conv.batch * bands.per_image);
    const float* weight = weights + group * sizes.group_weight;
    const float* bias = biases + group * sizes.group_bias;
    if (p.tile() == 2) return winograd_unit<2>(group, first, last, weight, bias, workspace);
    if (p.tile() == 4) return winograd_unit<4>(group, first, last, weight, bias, workspace);
    const Band band(p, bands, first);
    pack(group, band, workspace);
    for_blocks([&](auto vectors, int64_t block) {
      channel_block<decltype(vectors)::value>(band, group, block, workspace, weight, bias, 0);
    });
    return true;
  }

  // The input of a band, to the start of `workspace`.
  void pack(int64_t group, const Band& band, float* workspace) const {
    pack_input(p, bands, band, input + group * p.conv.group_in() * p.input_strides[1], workspace);
  }

  // Runs body(vectors, block) for every block of channels, `vectors` being the registers that it has.
  template <typename Body>
  void for_blocks(const Body& body) const {
    for (int64_t block = 0; block < sizes.blocks; ++block) {
      if (p.conv.group_out() - block * kBlock > kLanes) {
        body(std::integral_constant<int, 2>{}, block);
      } else {
        body(std::integral_constant<int, 1>{}, block);
      }
    }
  }

  // The bands [first, last).
  template <int M>
  bool winograd_unit(int64_t group, int64_t first, int64_t last, const float* weight, const float* bias,
                     float* workspace) const {
    const int64_t channels = p.conv.group_in(), block_weight = sizes.group_weight / sizes.blocks;
    const int64_t strip = bands.conv_rows * bands.conv_cols * kBlock;
    float* transformed = workspace + sizes.input;
    float* products = transformed + winograd.transformed;
    float* z = transformed + sizes.winograd;
    bool finite = true;
    const auto tiles_of = [&](const Band& band) { return band.conv_rows * bands.conv_cols / (M * M); };
    // Products of a block of channels with `count` tiles.
    const auto multiply = [&](auto vectors, int64_t block, int64_t count) {
      multiply_block<M, decltype(vectors)::value>(transformed, weight + block * block_weight, channels, count,
                                                  products);
    };

    if (winograd.tiles < bands.tiles()) {
      const Band band(p, bands, first);
      pack(group, band, workspace);
      for (int64_t from = 0; from < tiles_of(band); from += winograd.tiles) {
        const int64_t count = std::min(winograd.tiles, tiles_of(band) - from);
        transform_input<M>(bands, channels, workspace, from, count, count * channels, transformed);
        for_blocks([&](auto vectors, int64_t block) {
          multiply(vectors, block, count);
          finite &= transform_output<M, decltype(vectors)::value>(
              bands, products, bias + block * kBlock, from, count, count * kBlock, z + block * strip);
        });
      }
      for_blocks([&](auto vectors, int64_t block) {
        channel_block<decltype(vectors)::value>(band, group, block, workspace, weight, bias, block * strip);
      });
      return finite;
    }

    int64_t count = 0;
    for (int64_t index = first; index < last; ++index) count += tiles_of(Band(p, bands, index));
    int64_t at = 0;
    for (int64_t index = first; index < last; ++index) {
      const Band band(p, bands, index);
      pack(group, band, workspace);
      transform_input<M>(bands, channels, workspace, 0, tiles_of(band), count * channels,
                         transformed + at * channels);
      at += tiles_of(band);
    }
    for_blocks([&](auto vectors, int64_t block) {
      constexpr int VECTORS = decltype(vectors)::value;
      multiply(vectors, block, count);
      at = 0;
      for (int64_t index = first; index < last; ++index) {
        const Band band(p, bands, index);
        finite &= transform_output<M, VECTORS>(bands, products + at * kBlock, bias + block * kBlock, 0,
                                               tiles_of(band), count * kBlock, z);
        channel_block<VECTORS>(band, group, block, workspace, weight, bias, 0);
        at += tiles_of(band);
      }
    });
    return finite;
  }

  // One block of channels of a band from its packed input, or from the strip that Winograd's method has left
  // at `strip` of z. weight and bias are those of the group.
  template <int VECTORS>
  void channel_block(const Band& band, int64_t group, int64_t block, float* workspace, const float* weight,
                     const float* bias, int64_t strip) const {
    const int64_t channels = std::min<int64_t>(kBlock, p.conv.group_out() - block * kBlock);
    const float* packed = workspace;
    float* z = workspace + sizes.input + sizes.winograd + strip;
    float* y_tile = workspace + sizes.input + sizes.winograd + sizes.z;
    const int64_t plane = p.pool.output_size[0] * p.pool.output_size[1];
    const int64_t pixels = band.pooled_rows * p.pool.output_size[1];
    const int64_t k = group * p.conv.group_out() + block * kBlock;
    const int64_t first = band.first_pooled * p.pool.output_size[1];
    const int64_t channel_stride = p.pool.channels_last ? 1 : plane;
    const int64_t pixel_stride = p.pool.channels_last ? total : 1;
    const int64_t at = band.image * total * plane + k * channel_stride + first * pixel_stride;

    PooledTile tile{y_tile, reinterpret_cast<uint8_t*>(y_tile + sizes.y), kBlock, channels, true};
    if constexpr (std::is_same_v<T, float>) {
      if (p.pool.channels_last) {
        tile = {y + at, winner_mask == nullptr ? nullptr : winner_mask + at, total, channels, false};
      }
    }
    if (winner_mask == nullptr) tile.winner_mask = nullptr;

    const float* w = weight + block * (sizes.group_weight / sizes.blocks);
    const float* b = bias + block * kBlock;
    if (in_registers) {
      band_2x2<VECTORS>(p, bands, band, taps, packed, w, b, tile);
    } else {
      if (p.tile() == 1) band_convolution<VECTORS>(p, bands, band, taps, packed, w, b, z);
      finish_strip<VECTORS>(p.pool, bands, band, z, tile);
    }
    if (goes_through_tile<T>(p)) {
      flush(tile.y, pixels, channels, y + at, channel_stride, pixel_stride);
      if (winner_mask != nullptr)
        flush(tile.winner_mask, pixels, channels, winner_mask + at, channel_stride, pixel_stride);
    }
  }
};

template <typename T>
bool forward_round(const ConvBlockParams& p, int64_t total, const WeightSteps& steps, const T* input,
                   const T* weight, const T* bias, T* y, uint8_t* winner_mask, float* workspace) {
  const Forward<T> forward(p, total, input, y, winner_mask);
  const ForwardWorkspace& sizes = forward.sizes;
  const int64_t groups = p.conv.groups, outputs = p.conv.group_out();
  float* packed_weight = workspace;
  float* packed_bias = packed_weight + sizes.weight;
  float* own = packed_bias + sizes.bias;
  for (int64_t group = 0; group < groups; ++group) {
    const T* from = weight + group * steps.group;
    float* to = packed_weight + group * sizes.group_weight;
    if (p.tile() == 1) pack_direct_weight(p.conv, steps, from, to);
    if (p.tile() == 2) pack_winograd_weight<2>(p.conv, steps, from, to);
    if (p.tile() == 4) pack_winograd_weight<4>(p.conv, steps, from, to);
    float* group_bias = packed_bias + group * sizes.group_bias;
    std::fill_n(group_bias, sizes.group_bias, 0.0f);
    if (bias != nullptr) convert(bias + group * outputs, outputs, group_bias);
  }

  std::atomic<bool> finite{true};
  at::parallel_for(0, forward.units(), 1, [&](int64_t begin, int64_t end) {
    float* thread_workspace = own + at::get_thread_num() * sizes.per_thread();
    for (int64_t index = begin; index < end; ++index) {
      if (!forward.unit(index, packed_weight, packed_bias, thread_workspace)) finite = false;
    }
  });
  return finite;
}

template <typename T>
bool forward_of(const ConvBlockParams& p, const WeightSteps& steps, const T* input, const T* weight,
                const T* bias, T* y, uint8_t* winner_mask, float* workspace) {
  ConvBlockParams part = one_round(p);
  const int64_t total = p.conv.out_channels, at_once = part.conv.out_channels;
  const int64_t step = p.pool.channels_last ? 1 : p.pool.output_size[0] * p.pool.output_size[1];
  for (int64_t first = 0; first < total; first += at_once) {
    part.conv.out_channels = std::min(at_once, total - first);
    if (!forward_round(part, total, steps, input, weight + first * steps.out,
                       bias == nullptr ? nullptr : bias + first, y + first * step,
                       winner_mask == nullptr ? nullptr : winner_mask + first * step, workspace)) {
      return false;
    }
  }
  return true;
}

bool forward(const ConvBlockParams& p, const WeightSteps& steps, Dtype dtype, const void* input,
             const void* weight, const void* bias, void* y, uint8_t* winner_mask, float* workspace) {
  return dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    return forward_of(p, steps, static_cast<const T*>(input), static_cast<const T*>(weight),
                      static_cast<const T*>(bias), static_cast<T*>(y), winner_mask, workspace);
  });
}

}  // namespace dlfast::DLFAST_LEVEL
