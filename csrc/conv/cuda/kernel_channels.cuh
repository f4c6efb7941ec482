// The convolution block as an implicit GEMM on tensor cores, for many input channels. No Torch, no launch.
//
// A chunk of kChunkBytes of every pixel of the patch is in shared memory once and serves all taps; the
// weights of those channels stream through stages of a few taps each. Copies run kStages - 1 stages ahead.
//
// Shared memory holds rows of kPieces pieces (see kernel_source.cuh): pixels of the patch, and output
// channels of the weights.
#pragma once

#include "conv/cuda/kernel_finish.cuh"
#include "conv/cuda/kernel_source.cuh"
#include "core/tensor_core.h"

namespace dlfast {

constexpr int kStages = 3;

// What shared memory holds, in bytes from its start.
struct ChannelsLayout {
  int32_t taps_per_stage;
  int32_t stages_per_chunk;
  int32_t patches;      // buffers
  int32_t patch_bytes;  // of one
  int32_t weights_at;
  int32_t patches_at;
};

template <typename W_, typename Source, int kColumns>
struct ConvChannels {
  using T = typename Source::T;
  using W = W_;
  static constexpr int kChannels = 8 * kColumns;  // of the output, per block
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kTapBytes = kChannels * kChunkBytes;

  ConvTile t;
  ChannelsLayout layout;
  Source source;
  const T* weight;       // [K, taps, C]
  bool weight_in_packs;  // 16-byte accesses
  ConvFinish<T> finish;

  DLFAST_DEVICE void run(Thread thread, unsigned char* shared) const {
#ifdef DLFAST_TENSOR_CORES
    const BlockSite site = block_site(t, thread.block, kChannels);
    const int warp = static_cast<int>(thread.index) / 32, lane = static_cast<int>(thread.index) % 32;
    auto* tap_at = reinterpret_cast<int32_t*>(shared);  // [taps, W::width]
    find_taps<W>(t, thread.index, tap_at);

    // This lane's row of each fragment, as the pixel that tap (0, 0) reads without the column in the window.
    const int slabs = t.tile[1] / kSlab;
    const int row = warp / slabs, column = warp % slabs * kSlab;
    const int window = column + lane % 8, second = lane / 8 % 2;
    int pixel[W::fragments];
#pragma unroll
    for (int f = 0; f < W::fragments; ++f) {
      const int position = min(2 * f + second, W::positions - 1);  // an odd one out computes the last again
      pixel[f] = (row * W::height + position / W::width) * t.stride[0] * t.row_pitch +
                 window * (W::width * t.stride[1] / t.planes);
    }
    const int piece = lane / 16;
    const int weight_row = lane / 16 * 8 + lane % 8;
    const uint32_t weight_at = piece_at(weight_row, lane / 8 % 2);
    const uint32_t base = shared_address(shared);

    float acc[W::fragments][kColumns][4] = {};
    const int chunks = (t.in_channels + kChunk - 1) / kChunk;
    const int total = chunks * layout.stages_per_chunk;
    Progress loading{}, computing{};
    for (int i = 0; i < kStages - 1; ++i) {
      load(site, thread.index, shared, loading, i < total);
      copy_commit();
    }
#pragma unroll 1
    for (int stage = 0; stage < total; ++stage) {
      copy_wait<kStages - 2>();
      __syncthreads();
      load(site, thread.index, shared, loading, stage + kStages - 1 < total);
      copy_commit();
      const uint32_t patch = base + layout.patches_at + computing.patch * layout.patch_bytes;
      const uint32_t weights =
          base + layout.weights_at + computing.buffer * layout.taps_per_stage * kTapBytes;
      const int first = computing.stage * layout.taps_per_stage;
      const int taps = min(layout.taps_per_stage, t.taps() - first);
      const bool both = t.in_channels - computing.chunk * kChunk > kChunk / 2;
#pragma unroll 1
      for (int tap = 0; tap < taps; ++tap) {
        uint32_t a_at[W::fragments];
#pragma unroll
        for (int f = 0; f < W::fragments; ++f) {
          const int in_window = min(2 * f + second, W::positions - 1) % W::width;
          const int at = pixel[f] + tap_at[(first + tap) * W::width + in_window];
          a_at[f] = patch + piece_at(at, piece);
        }
        const uint32_t b_at = weights + tap * kTapBytes + weight_at;
        multiply_step(acc, a_at, b_at, 0);
        if (both) multiply_step(acc, a_at, b_at, kStepBytes);
      }
      advance(computing);
    }
    copy_wait<0>();
    finish.template run<W>(t, site, site.window[0] + row, site.window[1] + column, lane, acc);
#else
    __trap();  // the heuristics go by what the code was compiled for
#endif
  }

#ifdef DLFAST_TENSOR_CORES
 private:
  // A stage on its way through the buffers.
  struct Progress {
    int chunk, stage;   // stage within the chunk
    int patch, buffer;  // which buffers hold them
  };

  DLFAST_DEVICE void advance(Progress& p) const {
    p.buffer = p.buffer + 1 == kStages ? 0 : p.buffer + 1;
    if (++p.stage < layout.stages_per_chunk) return;
    p.stage = 0;
    ++p.chunk;
    p.patch = p.patch + 1 == layout.patches ? 0 : p.patch + 1;
  }

  DLFAST_DEVICE void load(const BlockSite& site, uint32_t thread, unsigned char* shared, Progress& p,
                          bool there_is_one) const {
    if (!there_is_one) return;
    if (p.stage == 0) {
      source.fill(
          t,
          patch_site<W>(t, site, p.chunk * kChunk, shared + layout.patches_at + p.patch * layout.patch_bytes),
          thread);
    }
    const int first = p.stage * layout.taps_per_stage;
    const int taps = min(layout.taps_per_stage, t.taps() - first);
    unsigned char* to = shared + layout.weights_at + p.buffer * layout.taps_per_stage * kTapBytes;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap, to += kTapBytes) {
#pragma unroll 1
      for (int i = static_cast<int>(thread); i < kChannels * kPieces; i += kConvThreads) {
        const int c = i / kPieces, piece = i % kPieces, row = ChannelOrder<T>::column(c);
        const int channel = site.first_channel + c, in = p.chunk * kChunk + piece * kPackSize<T>;
        const int present = channel < t.out_channels ? t.in_channels - in : 0;
        const T* from =
            weight + (static_cast<int64_t>(channel) * t.taps() + first + tap) * t.in_channels + in;
        SameSink<T>::copy(to + piece_at(row, piece), from, weight, present, weight_in_packs);
      }
    }
    advance(p);
  }

  // acc += a b over one step along k, `offset` (0 or kStepBytes) into the rows.
  static DLFAST_DEVICE void multiply_step(float (&acc)[W::fragments][kColumns][4],
                                          const uint32_t (&a_at)[W::fragments], uint32_t b_at,
                                          uint32_t offset) {
    uint32_t a[W::fragments][4];
#pragma unroll
    for (int f = 0; f < W::fragments; ++f) {
      load_matrices(a[f], a_at[f] ^ offset);
      if constexpr (sizeof(T) == 4) round_to_tf32(a[f]);
    }
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[4];
      load_matrices(b, (b_at ^ offset) + n * 8 * kChunkBytes);
      if constexpr (sizeof(T) == 4) round_to_tf32(b);
#pragma unroll
      for (int f = 0; f < W::fragments; ++f) {
        multiply_add<T>(acc[f][n], a[f], b[0], b[1]);
        multiply_add<T>(acc[f][n + 1], a[f], b[2], b[3]);
      }
    }
  }
#endif
};

}  // namespace dlfast
