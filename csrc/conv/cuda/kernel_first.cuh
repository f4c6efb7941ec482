// The convolution block on tensor cores for few input channels (up to 4): first layers. No Torch, no launch.
//
// The whole patch and all weights are in shared memory from the start. A pixel is `words` 32-bit words: two
// channels of 16 bits each, or one of float32. k runs over the words of the taps; every lane fetches its own
// words of the patch, through a table of where the words of the taps lie.
#pragma once

#include "conv/cuda/kernel_finish.cuh"
#include "core/tensor_core.h"

namespace dlfast {

constexpr int kStepWords = kStepBytes / 4;

struct FirstLayout {
  int32_t log_words;   // of the words of a pixel
  int32_t steps;       // along k
  int32_t weights_at;  // bytes from the start of shared memory
  int32_t patch_at;
  int32_t end;
  FastDivmod<uint32_t> by_filter, by_channels;  // taps * C and C elements

  DLFAST_HOST_DEVICE int32_t words() const { return 1 << log_words; }
  DLFAST_HOST_DEVICE int32_t weight_pitch() const {
    return steps * kStepWords + 4;
  }  // an odd number of 16 bytes
};

template <typename T_, typename W_, int kColumns>
struct ConvFirst {
  using T = T_;
  using W = W_;
  static constexpr int kChannels = 8 * kColumns;
  static constexpr int kLogPerWord = sizeof(T) == 2 ? 1 : 0;
  static constexpr int kNowhere = -1;

  ConvTile t;
  FirstLayout layout;
  const T* input;   // [N, H, W, C]
  const T* weight;  // [K, taps, C]
  ConvFinish<T> finish;

  DLFAST_DEVICE void run(Thread thread, unsigned char* shared) const {
#ifdef DLFAST_TENSOR_CORES
    const BlockSite site = block_site(t, thread.block, kChannels);
    const int warp = static_cast<int>(thread.index) / 32, lane = static_cast<int>(thread.index) % 32;
    auto* word_at = reinterpret_cast<int32_t*>(shared);                       // [words of k, W::width]
    auto* weights = reinterpret_cast<uint32_t*>(shared + layout.weights_at);  // [channels, weight_pitch]
    auto* patch = reinterpret_cast<uint32_t*>(shared + layout.patch_at);
    find_words(thread.index, word_at);
    // What nothing is loaded to: outside of the input, and what fills up words and steps.
    for (int at = layout.weights_at + 16 * static_cast<int>(thread.index); at < layout.end;
         at += 16 * kConvThreads) {
      *reinterpret_cast<Pack<uint32_t, 4>*>(shared + at) = {};
    }
    __syncthreads();
    load_weights(thread.index, site, reinterpret_cast<T*>(weights));
    load_patch(thread.index, site, reinterpret_cast<T*>(patch));
    __syncthreads();

    const int slabs = t.tile[1] / kSlab;
    const int row = warp / slabs, column = warp % slabs * kSlab;
    // The first word of this lane's window, in the patch.
    const int window = (row * W::height * t.stride[0] * t.row_pitch +
                        (column + lane / 4) * (W::width * t.stride[1] / t.planes)) *
                       layout.words();
    const int down = t.stride[0] * t.row_pitch * layout.words();
    const int q = lane % 4;
    const int weight_row = lane / 16 * 8 + lane % 8;
    uint32_t b_at = shared_address(weights) + (weight_row * layout.weight_pitch() + lane / 8 % 2 * 4) * 4;

    float acc[W::fragments][kColumns][4] = {};
#pragma unroll 1
    for (int step = 0; step < layout.steps; ++step, b_at += kStepBytes) {
      int32_t at[2][W::width];  // of words q and q + 4, for every column of the window
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < W::width; ++i) {
          at[half][i] = word_at[(step * kStepWords + 4 * half + q) * W::width + i];
        }
      }
      uint32_t a[W::fragments][4];
#pragma unroll
      for (int f = 0; f < W::fragments; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // row i % 2, words from i / 2 * 4
          const int position = 2 * f + i % 2;
          const int where = at[i / 2][position % W::width];
          a[f][i] = where == kNowhere ? 0u : patch[window + position / W::width * down + where];
        }
        if constexpr (sizeof(T) == 4) round_to_tf32(a[f]);
      }
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        uint32_t b[4];
        load_matrices(b, b_at + n * 8 * layout.weight_pitch() * 4);
        if constexpr (sizeof(T) == 4) round_to_tf32(b);
#pragma unroll
        for (int f = 0; f < W::fragments; ++f) {
          multiply_add<T>(acc[f][n], a[f], b[0], b[1]);
          multiply_add<T>(acc[f][n + 1], a[f], b[2], b[3]);
        }
      }
    }
    finish.template run<W>(t, site, site.window[0] + row, site.window[1] + column, lane, acc);
#else
    __trap();  // the heuristics go by what the code was compiled for
#endif
  }

#ifdef DLFAST_TENSOR_CORES
 private:
  static_assert(W::positions % 2 == 0, "every row of the fragments is a position");

  DLFAST_DEVICE void find_words(uint32_t thread, int32_t* word_at) const {
    for (int i = static_cast<int>(thread); i < layout.steps * kStepWords * W::width; i += kConvThreads) {
      const int k = i / W::width, in_window = i % W::width;
      const int tap = k >> layout.log_words, word = k & (layout.words() - 1);
      const int r = tap / t.kernel[1], s = tap % t.kernel[1];
      const int pixel =
          r * t.dilation[0] * t.row_pitch + t.column_at(in_window * t.stride[1] + s * t.dilation[1]);
      word_at[i] = tap < t.taps() ? pixel * layout.words() + word : kNowhere;
    }
  }

  // The rows in the order of ChannelOrder, the channels of a tap from a word's start.
  DLFAST_DEVICE void load_weights(uint32_t thread, const BlockSite& site, T* to) const {
    const int filter = t.taps() * t.in_channels;
    const T* from = weight + static_cast<int64_t>(site.first_channel) * filter;
    const int count = min(kChannels, t.out_channels - site.first_channel) * filter;
#pragma unroll 4
    for (int i = static_cast<int>(thread); i < count; i += kConvThreads) {
      const auto channel = layout.by_filter.divide(static_cast<uint32_t>(i));
      const auto tap = layout.by_channels.divide(channel.remainder);
      const int row = ChannelOrder<T>::column(static_cast<int>(channel.quotient));
      to[(row * layout.weight_pitch() << kLogPerWord) + (tap.quotient << (layout.log_words + kLogPerWord)) +
         tap.remainder] = from[i];
    }
  }

  DLFAST_DEVICE void load_patch(uint32_t thread, const BlockSite& site, T* to) const {
    const int per_row = t.patch[1] * t.in_channels;
    const int top = site.window[0] * W::height * t.stride[0] - t.padding[0];
    const int left = site.window[1] * W::width * t.stride[1] - t.padding[1];
    const T* from = input + site.image * t.in[0] * t.in[1] * t.in_channels;
    const int warp = static_cast<int>(thread) / 32, lane = static_cast<int>(thread) % 32;
#pragma unroll 1
    for (int row = warp; row < t.patch[0]; row += kConvWarps) {
      const int h = top + row;
      if (static_cast<uint32_t>(h) >= static_cast<uint32_t>(t.in[0])) continue;
#pragma unroll 4
      for (int i = lane; i < per_row; i += 32) {
        const auto column = layout.by_channels.divide(static_cast<uint32_t>(i));
        const int w = left + static_cast<int>(column.quotient);
        if (static_cast<uint32_t>(w) >= static_cast<uint32_t>(t.in[1])) continue;
        const int pixel = row * t.row_pitch + t.column_at(static_cast<int>(column.quotient));
        to[(pixel << (layout.log_words + kLogPerWord)) + column.remainder] =
            from[(h * t.in[1] + w) * t.in_channels + column.remainder];
      }
    }
  }
#endif
};

}  // namespace dlfast
