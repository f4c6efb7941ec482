// Where the patch of a convolution comes from: a tensor, or the gradient of the convolution output, expanded
// from the pooled gradient and the winner mask on the way into shared memory. No Torch, no launch.
//
// A patch in shared memory has kChunkBytes of every pixel's channels, as kPieces pieces of 16 bytes. What a
// piece holds is the sink's affair.
#pragma once

#include "conv/cuda/conv_tile.h"
#include "core/tensor_core.h"
#include "pool/cuda/kernel_relu_pool.cuh"

namespace dlfast {

constexpr int kChunkBytes = 64;
constexpr int kPieces = kChunkBytes / 16;

// Where piece `piece` of row `row` lies in it: eight rows that follow each other have their pieces of one
// number in eight different places of 128 bytes.
DLFAST_DEVICE int place(int row, int piece) {
  return piece ^ (row / 2 % 4);
}

DLFAST_DEVICE int piece_at(int row, int piece) {
  return row * kChunkBytes + place(row, piece) * 16;
}

// Pieces of T as they are.
template <typename T_>
struct SameSink {
  using T = T_;
  static constexpr int N = kPackSize<T>;

  static DLFAST_DEVICE void write(unsigned char* to, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
  // `anything` is an address that may be named where nothing is present.
  static DLFAST_DEVICE void copy(unsigned char* to, const T* from, [[maybe_unused]] const T* anything,
                                 int present, bool in_packs) {
#ifdef DLFAST_TENSOR_CORES
    if (in_packs) {
      copy_async_16(shared_address(to), present > 0 ? from : anything, present > 0);
      return;
    }
#endif
    write(to, read_pack<N>(from, present, in_packs));
  }
};

// Pieces of float32.
template <typename T_>
struct WideSink {
  using T = T_;
  static constexpr int N = 4;

  static DLFAST_DEVICE void write(unsigned char* to, const Pack<T, N>& pack) {
    Pack<float, N> wide;
#pragma unroll
    for (int i = 0; i < N; ++i) wide.at[i] = widen(pack.at[i]);
    *reinterpret_cast<Pack<float, N>*>(to) = wide;
  }
  static DLFAST_DEVICE void copy(unsigned char* to, const T* from, const T* /*anything*/, int present,
                                 bool in_packs) {
    write(to, read_pack<N>(from, present, in_packs));
  }
};

// What the sources work on: a part of the channels of a patch.
struct PatchSite {
  int64_t image;
  int32_t origin[2];  // the patch's first pixel, which may lie outside
  int32_t first_channel;
  unsigned char* shared;
};

// The patch under a block's tile.
template <typename W>
DLFAST_DEVICE PatchSite patch_site(const ConvTile& t, const BlockSite& site, int first_channel,
                                   unsigned char* shared) {
  return {site.image,
          {site.window[0] * W::height * t.stride[0] - t.padding[0],
           site.window[1] * W::width * t.stride[1] - t.padding[1]},
          first_channel,
          shared};
}

// tap_at [taps, W::width]: where in the patch a tap of a window's column lies, from the window's own pixel.
template <typename W>
DLFAST_DEVICE void find_taps(const ConvTile& t, uint32_t thread, int32_t* tap_at) {
  for (int i = static_cast<int>(thread); i < t.taps() * W::width; i += kConvThreads) {
    const int tap = i / W::width, in_window = i % W::width;
    const int r = tap / t.kernel[1], s = tap % t.kernel[1];
    tap_at[i] = r * t.dilation[0] * t.row_pitch + t.column_at(in_window * t.stride[1] + s * t.dilation[1]);
  }
}

// Calls visit(index, piece) for the pieces of `count` pixels or windows, by all threads. Half a chunk is one
// step of a product; where no channel is left for the second half, nobody reads it.
template <typename Visit>
DLFAST_DEVICE void for_each_piece(uint32_t thread, int count, bool whole_chunk, Visit visit) {
  const int shift = whole_chunk ? 2 : 1;
#pragma unroll 1
  for (int i = static_cast<int>(thread); i < count << shift; i += kConvThreads) {
    visit(i >> shift, i & ((1 << shift) - 1));
  }
}

// Calls visit(inside, offset, channel, to) for every piece of every pixel of the patch: whether the pixel
// lies in the tensor, the piece's first element in the image, its first channel, and where it goes.
template <int N, typename Visit>
DLFAST_DEVICE void for_each_pixel(const ConvTile& t, const PatchSite& site, uint32_t thread, Visit visit) {
  const bool whole_chunk = t.in_channels - site.first_channel > N * kPieces / 2;
  for_each_piece(thread, t.patch[0] * t.patch[1], whole_chunk, [&](int pixel, int piece) {
    const auto at = t.by_patch_columns.divide(static_cast<uint32_t>(pixel));
    const int row = static_cast<int>(at.quotient), column = static_cast<int>(at.remainder);
    const int h = site.origin[0] + row, w = site.origin[1] + column;
    const bool inside = static_cast<uint32_t>(h) < static_cast<uint32_t>(t.in[0]) &&
                        static_cast<uint32_t>(w) < static_cast<uint32_t>(t.in[1]);
    const int channel = site.first_channel + piece * N;
    visit(inside, (h * t.in[1] + w) * t.in_channels + channel, channel,
          site.shared + piece_at(row * t.row_pitch + t.column_at(column), piece));
  });
}

// [N, H, W, C]
template <typename Sink>
struct TensorSource {
  using T = typename Sink::T;
  const T* input;
  bool in_packs;  // C is a multiple of a pack and the address is too

  DLFAST_DEVICE void fill(const ConvTile& t, const PatchSite& site, uint32_t thread) const {
    const T* image = input + site.image * t.in[0] * t.in[1] * t.in_channels;
    for_each_pixel<Sink::N>(t, site, thread, [&](bool inside, int offset, int channel, unsigned char* to) {
      const int present = inside ? t.in_channels - channel : 0;
      Sink::copy(to, image + offset, input, present, in_packs);
    });
  }
};

// The gradient of the convolution output where ReLU alone followed: grad_y where !(y <= 0).
template <typename Sink>
struct MaskedSource {
  using T = typename Sink::T;
  const T* grad_y;  // [N, OH, OW, K]
  const T* y;
  bool in_packs;

  DLFAST_DEVICE void fill(const ConvTile& t, const PatchSite& site, uint32_t thread) const {
    const int64_t image = site.image * t.in[0] * t.in[1] * t.in_channels;
    for_each_pixel<Sink::N>(t, site, thread, [&](bool inside, int offset, int channel, unsigned char* to) {
      const int present = inside ? t.in_channels - channel : 0;
      auto pack = read_pack<Sink::N>(grad_y + image + offset, present, in_packs);
      const auto output = read_pack<Sink::N>(y + image + offset, present, in_packs);
#pragma unroll
      for (int i = 0; i < Sink::N; ++i) {
        if (widen(output.at[i]) <= 0) pack.at[i] = narrow<T>(0.0f);
      }
      Sink::write(to, pack);
    });
  }
};

// The gradient of the convolution output under kSide x kSide max pooling, disjoint windows: each sends its
// gradient to the position its winner mask names.
template <typename Sink, int kSide>
struct PooledSource {
  using T = typename Sink::T;
  const T* grad_y;             // [N, PH, PW, K]
  const uint8_t* winner_mask;  // the same
  int32_t windows[2];          // PH, PW
  bool in_packs;

  DLFAST_DEVICE void fill(const ConvTile& t, const PatchSite& site, uint32_t thread) const {
    constexpr int N = Sink::N;
    // All windows that touch the patch, those that do not exist among them: their positions are zero.
    const int first[2] = {window_of(site.origin[0]), window_of(site.origin[1])};
    const int rows = window_of(site.origin[0] + t.patch[0] - 1) - first[0] + 1;
    const int columns = window_of(site.origin[1] + t.patch[1] - 1) - first[1] + 1;
    const bool whole_chunk = t.in_channels - site.first_channel > N * kPieces / 2;
    for_each_piece(thread, rows * columns, whole_chunk, [&](int index, int piece) {
      const int h = first[0] + index / columns, w = first[1] + index % columns;
      const bool exists = static_cast<uint32_t>(h) < static_cast<uint32_t>(windows[0]) &&
                          static_cast<uint32_t>(w) < static_cast<uint32_t>(windows[1]);
      const int channel = site.first_channel + piece * N;
      const int present = exists ? t.in_channels - channel : 0;
      const int64_t offset = ((site.image * windows[0] + h) * windows[1] + w) * t.in_channels + channel;
      const auto gradient = read_pack<N>(grad_y + offset, present, in_packs);
      const auto winner = read_pack<N>(winner_mask + offset, present, in_packs);
      // Pixels two apart share banks, and so would neighbouring windows that wrote the same position.
      const int turn = kSide % 2 == 0 ? w & 1 : 0;
#pragma unroll
      for (int turned = 0; turned < kSide * kSide; ++turned) {
        const int position = turned ^ turn;
        const int row = h * kSide + position / kSide - site.origin[0];
        const int column = w * kSide + position % kSide - site.origin[1];
        if (static_cast<uint32_t>(row) >= static_cast<uint32_t>(t.patch[0]) ||
            static_cast<uint32_t>(column) >= static_cast<uint32_t>(t.patch[1])) {
          continue;
        }
        Pack<T, N> pack;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          pack.at[i] = winner.at[i] == position ? gradient.at[i] : narrow<T>(0.0f);
        }
        Sink::write(site.shared + piece_at(row * t.row_pitch + t.column_at(column), piece), pack);
      }
    });
  }

 private:
  // Of a position that may be negative, but not by more than 2^20.
  static DLFAST_DEVICE int window_of(int position) {
    constexpr int kShift = 1 << 20;
    return (position + kShift * kSide) / kSide - kShift;
  }
};

}  // namespace dlfast
