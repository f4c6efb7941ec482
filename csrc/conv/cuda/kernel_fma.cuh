// The convolution block by ordinary multiply-adds in float32: float32 without TF32, and 16-bit types where
// there are no tensor cores for them. Any architecture. No Torch, no launch.
//
// A thread owns the same windows and channels as in ConvChannels, so that the same code finishes. The patch
// is in shared memory as float32, a chunk of channels at a time; so are the weights of a few taps, as
// [taps, channels in, channels out].
#pragma once

#include "conv/cuda/kernel_finish.cuh"
#include "conv/cuda/kernel_source.cuh"

namespace dlfast {

struct FmaLayout {
  int32_t taps_per_stage;
  int32_t weights_at;  // bytes from the start of shared memory
  int32_t patch_at;
};

template <typename W_, typename Source, int kColumns>
struct ConvFma {
  using T = typename Source::T;
  using W = W_;
  using Order = ChannelOrder<T>;
  static constexpr int kChannels = 8 * kColumns;
  static constexpr int kChunk = kChunkBytes / 4;
  static constexpr int kBlocksPerSm = W::fragments > 2 ? 1 : 2;  // registers for nine positions

  ConvTile t;
  FmaLayout layout;
  Source source;
  const T* weight;       // [K, taps, C]
  bool weight_in_packs;  // of four
  ConvFinish<T> finish;

  DLFAST_DEVICE void run(Thread thread, unsigned char* shared) const {
    const BlockSite site = block_site(t, thread.block, kChannels);
    const int warp = static_cast<int>(thread.index) / 32, lane = static_cast<int>(thread.index) % 32;
    auto* tap_at = reinterpret_cast<int32_t*>(shared);  // [taps, W::width]
    auto* weights = reinterpret_cast<float*>(shared + layout.weights_at);
    unsigned char* patch = shared + layout.patch_at;
    find_taps<W>(t, thread.index, tap_at);

    const int slabs = t.tile[1] / kSlab;
    const int row = warp / slabs, column = warp % slabs * kSlab;
    const int pixel = row * W::height * t.stride[0] * t.row_pitch +
                      (column + lane / 4) * (W::width * t.stride[1] / t.planes);
    const int down = t.stride[0] * t.row_pitch;
    const int owned = lane % 4 * Order::kOwned;

    float acc[W::fragments][kColumns][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < t.in_channels; chunk += kChunk) {
      const int left = min(kChunk, t.in_channels - chunk);
#pragma unroll 1
      for (int first = 0; first < t.taps(); first += layout.taps_per_stage) {
        const int taps = min(layout.taps_per_stage, t.taps() - first);
        __syncthreads();
        if (first == 0) source.fill(t, patch_site<W>(t, site, chunk, patch), thread.index);
        load_weights(thread.index, site, chunk, first, taps, weights);
        __syncthreads();
#pragma unroll 1
        for (int tap = 0; tap < taps; ++tap) {
          int at[W::width];
#pragma unroll
          for (int i = 0; i < W::width; ++i) at[i] = pixel + tap_at[(first + tap) * W::width + i];
#pragma unroll 1
          for (int in = 0; in < left; in += 4) {
            multiply_four(acc, patch, at, down, in / 4, weights + (tap * kChunk + in) * kChannels + owned,
                          left - in);
          }
        }
      }
    }
    finish.template run<W>(t, site, site.window[0] + row, site.window[1] + column, lane, acc);
  }

 private:
  // acc += (four channels of the windows' pixels) x (their weights); `left` of the four exist.
  static DLFAST_DEVICE void multiply_four(float (&acc)[W::fragments][kColumns][4], const unsigned char* patch,
                                          const int (&at)[W::width], int down, int piece,
                                          const float* weights, int left) {
    Pack<float, 4> a[W::positions];
#pragma unroll
    for (int p = 0; p < W::positions; ++p) {
      const int where = at[p % W::width] + p / W::width * down;
      a[p] = *reinterpret_cast<const Pack<float, 4>*>(patch + piece_at(where, piece));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k >= left) break;
#pragma unroll
      for (int group = 0; group < kColumns / Order::kFragments; ++group) {
#pragma unroll
        for (int i = 0; i < Order::kOwned; i += 4) {
          const auto b = load_pack<4>(weights + k * kChannels + group * Order::kGroup + i);
#pragma unroll
          for (int p = 0; p < W::positions; ++p) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float& sum = acc[p / 2][group * Order::kFragments + (i + j) / 2][p % 2 * 2 + j % 2];
              sum = fmaf(a[p].at[k], b.at[j], sum);
            }
          }
        }
      }
    }
  }

  DLFAST_DEVICE void load_weights(uint32_t thread, const BlockSite& site, int chunk, int first, int taps,
                                  float* to) const {
#pragma unroll 1
    for (int i = static_cast<int>(thread); i < taps * kPieces * kChannels; i += kConvThreads) {
      const int c = i % kChannels, piece = i / kChannels % kPieces, tap = i / kChannels / kPieces;
      const int channel = site.first_channel + c, in = chunk + piece * 4;
      const int present = channel < t.out_channels ? t.in_channels - in : 0;
      const auto pack =
          read_pack<4>(weight + (static_cast<int64_t>(channel) * t.taps() + first + tap) * t.in_channels + in,
                       present, weight_in_packs);
#pragma unroll
      for (int k = 0; k < 4; ++k) to[(tap * kChunk + piece * 4 + k) * kChannels + c] = widen(pack.at[k]);
    }
  }
};

}  // namespace dlfast
