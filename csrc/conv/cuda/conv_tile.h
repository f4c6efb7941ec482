// How the single kernels cuts a convolution into tiles: what a block computes and what it holds in shared
// memory. Host and device; no Torch.
//
// A block computes some channels of a tile of windows. A window is a pooling window of the convolution output
// or, without pooling, a column of kPlainRows of its pixels. Slabs of kSlab windows beside each other belong
// to one warp, which computes all their positions; GEMM row = window + kSlab * position, so that one thread's
// accumulators hold whole windows.
//
// The part of the input under the tile, with its halo, is the patch. Its pixels lie in shared memory in
// `planes` interleaved planes: column x at (x % planes) * plane + x / planes of its row. With as many planes
// as columns from one window to the next, neighbouring windows read neighbouring pixels: no bank conflicts.
#pragma once

#include <cstdint>

#include "core/fast_divmod.h"

namespace dlfast {

constexpr int kSlab = 8;
constexpr int kConvWarps = 8;  // of a block; each has one slab
constexpr int kConvThreads = 32 * kConvWarps;
constexpr int kPlainRows = 4;

// The positions of a window, as they follow each other along the rows of the GEMM.
template <int kHeight, int kWidth, bool kPool>
struct Window {
  static constexpr int height = kHeight, width = kWidth;
  static constexpr int positions = height * width;
  static constexpr int fragments = (positions + 1) / 2;  // of 16 rows: two positions of a slab
  static constexpr bool pooled = kPool;
};
using Window2x2 = Window<2, 2, true>;
using Window3x3 = Window<3, 3, true>;
using PlainWindow = Window<kPlainRows, 1, false>;

// Pairs are height, width. All sizes are those of one image; the batch only shows in the number of blocks.
struct ConvTile {
  int32_t in[2], in_channels;    // [N, H, W, C], what the convolution reads
  int32_t out[2], out_channels;  // of the convolution, before pooling
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t windows[2];  // of the output
  int32_t tile[2];     // windows of a block; the width is a multiple of kSlab
  int32_t patch[2];    // pixels
  int32_t planes, plane, row_pitch;
  FastDivmod<uint32_t> by_planes, by_patch_columns;
  FastDivmod<uint32_t> by_channel_tiles, by_tile_columns, by_tile_rows;

  DLFAST_HOST_DEVICE int32_t taps() const { return kernel[0] * kernel[1]; }
  // Where the pixel in column `column` of a row of the patch lies in it.
  DLFAST_HOST_DEVICE int32_t column_at(int32_t column) const {
    const auto at = by_planes.divide(static_cast<uint32_t>(column));
    return static_cast<int32_t>(at.remainder) * plane + static_cast<int32_t>(at.quotient);
  }
  DLFAST_HOST_DEVICE int32_t patch_pixels() const { return patch[0] * row_pitch; }
};

// What a block works on.
struct BlockSite {
  int64_t image;
  int32_t window[2];      // its first
  int32_t first_channel;  // of the output
};

DLFAST_HOST_DEVICE BlockSite block_site(const ConvTile& t, uint32_t block, int32_t channels_per_block) {
  // Blocks that read the same patch follow each other.
  const auto channels = t.by_channel_tiles.divide(block);
  const auto column = t.by_tile_columns.divide(channels.quotient);
  const auto row = t.by_tile_rows.divide(column.quotient);
  return {
      static_cast<int64_t>(row.quotient),
      {static_cast<int32_t>(row.remainder) * t.tile[0], static_cast<int32_t>(column.remainder) * t.tile[1]},
      static_cast<int32_t>(channels.remainder) * channels_per_block};
}

}  // namespace dlfast
