// The strip: convolution rows under a band for one block of output channels, z
// [conv_rows][conv_cols][kBlock], which stays in cache, and its way through ReLU and pooling to the output.
#pragma once

#include "conv/cpu/band.h"
#include "conv/cpu/copy.h"
#include "conv/cpu/kernels.h"
#include "core/level.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

constexpr int kBlock = 2 * kLanes;  // output channels computed together

// Where a block of channels of the pooled rows goes: straight to a channels_last output, or to a tile that
// `flush` turns into rows of the output.
struct PooledTile {
  float* y;
  uint8_t* winner_mask;   // null if not wanted
  int64_t pixel_stride;   // between pooled pixels, in elements
  int64_t channels;       // of the block that exist
  bool has_whole_blocks;  // or what follows the channels is somebody else's

  template <int VECTORS>
  DLFAST_INLINE void put(int64_t pixel, const Winner<F> (&winners)[VECTORS]) const {
    if (channels >= VECTORS * kLanes || has_whole_blocks) {
      for (int v = 0; v < VECTORS; ++v) {
        store(y + pixel * pixel_stride + v * kLanes, winners[v].value);
        if (winner_mask != nullptr)
          store_winner_mask(winner_mask + pixel * pixel_stride + v * kLanes, winners[v].position);
      }
      return;
    }
    float values[kBlock];
    uint8_t winner_masks[kBlock];
    for (int v = 0; v < VECTORS; ++v) {
      store(values + v * kLanes, winners[v].value);
      store_winner_mask(winner_masks + v * kLanes, winners[v].position);
    }
    std::memcpy(y + pixel * pixel_stride, values, channels * sizeof(float));
    if (winner_mask != nullptr) std::memcpy(winner_mask + pixel * pixel_stride, winner_masks, channels);
  }
};

// tile [pixels][kBlock] to an output where channels lie `channel_stride` and pixels `pixel_stride` apart.
template <typename From, typename To>
void flush(const From* tile, int64_t pixels, int64_t channels, To* out, int64_t channel_stride,
           int64_t pixel_stride) {
  if (channel_stride == 1) {
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t k = 0; k < channels; ++k)
        out[i * pixel_stride + k] = static_cast<To>(tile[i * kBlock + k]);
    }
    return;
  }
  // Where pixels lie together, the only other layout.
  transpose_matrix(tile, kBlock, pixels, channels, out, channel_stride);
}

// Whether windows are 2x2 with stride 2 and lie inside the convolution output, whole.
inline bool is_pool_2x2(const ReluPoolParams& pool) {
  const PoolWindow& w = pool.window;
  return pool.pool == Pool::max && w.size[0] == 2 && w.size[1] == 2 && w.stride[0] == 2 && w.stride[1] == 2 &&
         w.padding[0] == 0 && w.padding[1] == 0 && 2 * pool.output_size[0] <= pool.input_size[0] &&
         2 * pool.output_size[1] <= pool.input_size[1];
}

// Of what Winograd's method has left, which is finite or thrown away.
template <int VECTORS>
void pool_strip_2x2(const ReluPoolParams& pool, const Bands& bands, const Band& band, const float* z,
                    const PooledTile& tile) {
  const int64_t width = pool.output_size[1], row = bands.conv_cols * kBlock;
  const bool rectify = pool.activation == Activation::relu;
  for (int64_t py = 0; py < band.pooled_rows; ++py) {
    for (int64_t px = 0; px < width; ++px) {
      const float* from = z + 2 * py * row + 2 * px * kBlock;
      Winner<F> winners[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        const float* at = from + v * kLanes;
        winners[v].of_finite(
            {load<F>(at), load<F>(at + kBlock), load<F>(at + row), load<F>(at + row + kBlock)});
        if (rectify) winners[v].apply_relu();
      }
      tile.put(py * width + px, winners);
    }
  }
}

// Any window, or none.
template <int VECTORS>
void pool_strip(const ReluPoolParams& pool, const Bands& bands, const Band& band, const float* z,
                const PooledTile& tile) {
  const bool rectify = pool.activation == Activation::relu;
  for (int64_t i = 0; i < band.pooled_rows * pool.output_size[1]; ++i) {
    const int64_t py = band.first_pooled + i / pool.output_size[1], px = i % pool.output_size[1];
    const Span rows = window_span(pool, 0, py), cols = window_span(pool, 1, px);
    Winner<F> winners[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      winners[v].start((rows.begin - rows.origin) * pool.window.size[1] + cols.begin - cols.origin);
    }
    F sum[VECTORS] = {};
    for (int64_t h = rows.begin; h < rows.end; ++h) {
      for (int64_t w = cols.begin; w < cols.end; ++w) {
        const float* from = z + ((h - band.first_conv) * bands.conv_cols + w) * kBlock;
        const int64_t at = (h - rows.origin) * pool.window.size[1] + w - cols.origin;
        for (int v = 0; v < VECTORS; ++v) {
          const F value = load<F>(from + v * kLanes);
          if (pool.pool == Pool::avg) {
            sum[v] += rectify ? relu(value) : value;
          } else {
            winners[v].offer(value, at);
          }
        }
      }
    }
    const auto divisor = static_cast<float>(counted_length(pool, 0, py) * counted_length(pool, 1, px));
    for (int v = 0; v < VECTORS; ++v) {
      if (pool.pool == Pool::avg) {
        winners[v].value = sum[v] / divisor;
      } else if (rectify) {
        winners[v].apply_relu();
      }
    }
    tile.put(i, winners);
  }
}

// No pooling: only the ReLU, row by row.
template <int VECTORS>
void rectify_strip(const ReluPoolParams& pool, const Bands& bands, const Band& band, const float* z,
                   const PooledTile& tile) {
  const bool rectify = pool.activation == Activation::relu;
  for (int64_t h = 0; h < band.pooled_rows; ++h) {
    for (int64_t w = 0; w < pool.output_size[1]; ++w) {
      Winner<F> pixel[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        const F value = load<F>(z + (h * bands.conv_cols + w) * kBlock + v * kLanes);
        pixel[v].value = rectify ? relu(value) : value;
        pixel[v].position = Winner<F>::Index{} - 1;
      }
      tile.put(h * pool.output_size[1] + w, pixel);
    }
  }
}

template <int VECTORS>
void finish_strip(const ReluPoolParams& pool, const Bands& bands, const Band& band, const float* z,
                  const PooledTile& tile) {
  if (pool.pool == Pool::none) return rectify_strip<VECTORS>(pool, bands, band, z, tile);
  if (is_pool_2x2(pool)) return pool_strip_2x2<VECTORS>(pool, bands, band, z, tile);
  return pool_strip<VECTORS>(pool, bands, band, z, tile);
}

}  // namespace dlfast::DLFAST_LEVEL
