// The problem and the tiles of conv_grad_weight() as its device bodies see them. No Torch, no launch.
//
// grad_weight [K, kh, kw, C] is a matrix product: rows are outputs k, columns are (tap, channel), and the sum
// runs over the pixels of the convolution output. A block takes some rows and some columns, and walks over
// tiles of pixels. Of a tile it holds in shared memory, twice, to load one while it multiplies the other:
//   gradient  [pixel][output]   expanded from grad_y and winner mask, zero where nothing passes
//   patch     the input under the tile, all taps together: [slot][channel] or, for few channels, planes
//             [channel][slot]
//
// A slot is a position of the patch. Rows and columns are sorted by their phase of the convolution's stride,
// so that for any tap neighbouring pixels lie in neighbouring slots; and the pitches of rows and images
// are such that slot and pixel differ by a multiple of 8 from one row to the next. So eight pixels that
// begin at a multiple of eight lie in slots that are all different modulo 8, whatever tile, stride and tap:
// matrix loads have no bank conflicts.
#pragma once

#include "conv/params.h"
#include "core/fast_divmod.h"
#include "core/portability.h"

namespace dlfast::grad_weight {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// What a winner mask says, see params.h.
enum class Passing : int32_t {
  winners,   // the position of the winner in its window
  positive,  // y; gradient passes where !(y <= 0)
  all,       // nothing: there is none
};

// Channels of a block lie side by side in a slot, or in planes.
enum class PatchLayout : int32_t { slots, planes };

struct Params {
  // The problem. [2]: height, width.
  int32_t batch, channels, outputs;        // N, C, K
  int32_t in[2], pixels_of[2], pooled[2];  // input, convolution output, grad_y
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t window[2], window_stride[2];  // stride >= size; 1 and 1 without pooling
  Passing passing;
  bool packs_of_outputs,
      packs_of_channels;  // grad_y and winner mask, or input, may be read 16 bytes at a time

  // A tile: `images` times `tile` pixels, whole windows.
  int32_t images, tile[2];
  int32_t pixels;      // of a tile, rounded up to whole steps
  int32_t windows[2];  // of one image in it
  FastDivmod<uint32_t> by_windows[2];
  int32_t patch[2];                  // rows and columns of input under one image
  int32_t phase[2];                  // rows and columns of one phase of the stride
  int32_t row_pitch, image_pitch;    // in slots
  FastDivmod<uint32_t> by_tiles[2];  // tiles of a plane
  int32_t tiles;                     // of the problem

  // What a block takes.
  PatchLayout layout;
  FastDivmod<uint32_t> by_channels;
  int32_t block_outputs;                        // rows of the product
  int32_t log_output_packs, log_channel_packs;  // of a block, 16 bytes each
  int32_t block_channels, block_taps;  // columns; with planes all channels, and block_columns instead
  int32_t block_columns;
  int32_t columns_in_warps;                                    // of a block, those included that do not exist
  int32_t log_warps_outputs, log_warps_columns, warps_pixels;  // multiply to kWarps
  int32_t blocks_outputs, blocks_columns, splits;              // multiply to the grid

  // Shared memory, in bytes. Pitches: of a pixel's gradient, of a slot, of a plane and of its shifted copy.
  int32_t gradient_pitch, slot_pitch, plane_pitch, copy_pitch;
  int32_t at_share, at_columns, at_offsets, at_pixels, at_positions, at_bias, at_gradient, gradient_bytes,
      at_patch, patch_bytes;

  DLFAST_HOST_DEVICE int32_t taps() const { return kernel[0] * kernel[1]; }
  DLFAST_HOST_DEVICE int32_t positions() const { return images * patch[0] * patch[1]; }
  DLFAST_HOST_DEVICE int64_t columns() const { return int64_t{taps()} * channels; }

  DLFAST_HOST_DEVICE int32_t slot_of(int32_t row, int32_t column) const {
    return ((row % stride[0]) * phase[0] + row / stride[0]) * row_pitch + (column % stride[1]) * phase[1] +
           column / stride[1];
  }
  // From a pixel's slot to the one it meets at a tap.
  DLFAST_HOST_DEVICE int32_t tap_slot(int32_t tap) const {
    return slot_of(tap / kernel[1] * dilation[0], tap % kernel[1] * dilation[1]);
  }
};

// Where a tile lies.
struct Place {
  int32_t image, row, column;         // first pixel
  int32_t window_row, window_column;  // first window

  DLFAST_DEVICE Place(const Params& p, int32_t tile) {
    const auto by_column = p.by_tiles[1].divide(static_cast<uint32_t>(tile));
    const auto by_row = p.by_tiles[0].divide(by_column.quotient);
    image = static_cast<int32_t>(by_row.quotient) * p.images;
    row = static_cast<int32_t>(by_row.remainder) * p.tile[0];
    column = static_cast<int32_t>(by_column.remainder) * p.tile[1];
    window_row = static_cast<int32_t>(by_row.remainder) * p.windows[0];
    window_column = static_cast<int32_t>(by_column.remainder) * p.windows[1];
  }
};

// What a block takes, from its number.
struct Share {
  int32_t split, columns_block, first_output, first_channel;
  int32_t first_tile, last_tile;  // the one after the last

  DLFAST_DEVICE Share(const Params& p, uint32_t block) {
    const auto outputs = static_cast<uint32_t>(p.blocks_outputs);
    const auto columns = static_cast<uint32_t>(p.blocks_columns);
    first_output = static_cast<int32_t>(block % outputs) * p.block_outputs;
    columns_block = static_cast<int32_t>(block / outputs % columns);
    first_channel = 0;
    if (p.layout == PatchLayout::slots) {
      first_channel =
          columns_block % ((p.channels + p.block_channels - 1) / p.block_channels) * p.block_channels;
    }
    split = static_cast<int32_t>(block / outputs / columns);
    first_tile = static_cast<int32_t>(int64_t{p.tiles} * split / p.splits);
    last_tile = static_cast<int32_t>(int64_t{p.tiles} * (split + 1) / p.splits);
  }
};

// Tables in shared memory, the same for all tiles.
struct PixelEntry {
  int32_t slot;
  int32_t where;  // image << 24 | row << 12 | column; negative for what rounding up added
};
struct PositionEntry {
  int32_t slot;   // image << 20 is added
  int32_t where;  // row << 16 | column
};

// A column of the block.
struct ColumnEntry {
  int32_t offset;  // bytes from a pixel's place in the patch; 0, as good as any other, where nobody looks
  int32_t target;  // tap * C + channel, or kNone
};

constexpr int32_t kNone = -1;

// Columns of planes are numbered [C][kh][kw], which keeps the taps of a row together: the banks that they are
// in were chosen for that order. Others are [tap][channel].
template <typename T>
DLFAST_DEVICE ColumnEntry column_entry(const Params& p, int32_t columns_block, int32_t number) {
  int32_t channel, tap, in_patch;
  bool exists;
  if (p.layout == PatchLayout::planes) {
    const int32_t n = columns_block * p.block_columns + number;
    channel = n / p.taps();
    tap = n % p.taps();
    exists = number < p.block_columns;
    in_patch = channel * p.plane_pitch;
  } else {
    const int32_t blocks = (p.channels + p.block_channels - 1) / p.block_channels;
    const int32_t in_block = number % p.block_channels;
    channel = columns_block % blocks * p.block_channels + in_block;
    tap = columns_block / blocks * p.block_taps + number / p.block_channels;
    exists = number / p.block_channels < p.block_taps;
    in_patch = in_block * static_cast<int32_t>(sizeof(T));
  }
  if (!exists || tap >= p.taps() || channel >= p.channels) return {0, kNone};
  const int32_t slot_bytes = p.layout == PatchLayout::planes ? static_cast<int32_t>(sizeof(T)) : p.slot_pitch;
  return {in_patch + p.tap_slot(tap) * slot_bytes, tap * p.channels + channel};
}

template <typename T>
DLFAST_DEVICE void write_tables(const Params& p, const Share& share, unsigned char* shared, int32_t thread) {
  auto* columns = reinterpret_cast<ColumnEntry*>(shared + p.at_columns);
  for (int32_t i = thread; i < p.columns_in_warps; i += kThreads) {
    columns[i] = column_entry<T>(p, share.columns_block, i);
  }
  auto* pixels = reinterpret_cast<PixelEntry*>(shared + p.at_pixels);
  const int32_t plane = p.tile[0] * p.tile[1];
  for (int32_t i = thread; i < p.pixels; i += kThreads) {
    const int32_t image = i / plane, row = i % plane / p.tile[1], column = i % p.tile[1];
    // With n and s as stride and slot: slot_of(n row, n column) is row row_pitch + column.
    const bool real = image < p.images;
    pixels[i] = {real ? image * p.image_pitch + row * p.row_pitch + column : 0,
                 real ? image << 24 | row << 12 | column : kNone};
  }
  auto* positions = reinterpret_cast<PositionEntry*>(shared + p.at_positions);
  const int32_t area = p.patch[0] * p.patch[1];
  for (int32_t i = thread; i < p.positions(); i += kThreads) {
    const int32_t image = i / area, row = i % area / p.patch[1], column = i % area % p.patch[1];
    positions[i] = {image << 20 | (image * p.image_pitch + p.slot_of(row, column)), row << 16 | column};
  }
}

}  // namespace dlfast::grad_weight
