// The direct convolution of a band: every tap is multiplied and added.
//
// Output channels lie in the vector lanes, two registers of them at a time; the accumulators of a few pixels
// stay in registers over all taps. For a 2x2 window with stride 2 those pixels are whole windows, pooled
// where they are; otherwise they go to the strip (cpu_strip.h).
#pragma once

#include "conv/cpu/band.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/strip.h"
#include "core/level.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

// Enough independent accumulators to hide the latency of a multiply-add, few enough to stay in registers.
constexpr int kStrip = kLanes == 16 ? 12 : 6;   // pixels of a row
constexpr int kWindows = kLanes == 16 ? 3 : 1;  // 2x2 windows

// Where the numbers of one output channel of a weight lie, from first to last in memory, and where they go.
// `inner` of them in a row are the channels of a tap, or the taps of a channel.
struct WeightRun {
  int64_t inner, outer;            // counts
  int64_t inner_step, outer_step;  // in the weight
  int64_t inner_to, outer_to;      // in rows of the packed weight, [kh * kw][C]

  WeightRun(const ConvParams& conv, const WeightSteps& steps) {
    const int64_t channels = conv.group_in(), taps = conv.positions();
    const bool by_channel = steps.in == 1 || taps == 1;  // channels_last
    inner = by_channel ? channels : taps;
    outer = by_channel ? taps : channels;
    inner_step = by_channel ? steps.in : steps.kernel[1];
    outer_step = by_channel ? steps.kernel[1] : steps.in;
    inner_to = by_channel ? 1 : channels;
    outer_to = by_channel ? channels : 1;
  }
  // Whether the numbers lie together in this order, as those of a dense weight do in both formats.
  bool is_dense(const ConvParams& conv, const WeightSteps& steps) const {
    return inner_step == 1 && (outer == 1 || outer_step == inner) &&
           (conv.kernel[0] == 1 || steps.kernel[0] == conv.kernel[1] * steps.kernel[1]);
  }
};

// `lanes` output channels of `weight` as rows [kh * kw][C] of kBlock numbers.
template <typename T>
void pack_block(const ConvParams& conv, const WeightSteps& steps, const WeightRun& run, int64_t lanes,
                const T* weight, float* to) {
  const int64_t channels = conv.group_in(), count = run.inner * run.outer;
  int64_t lane = 0;
  if constexpr (std::is_same_v<T, float>) {
    using V = Vec<float, kLanes>;
    for (; run.is_dense(conv, steps) && lane + kLanes <= lanes; lane += kLanes) {
      const float* from = weight + lane * steps.out;
      int64_t inner = 0, row = 0;
      for (int64_t i = 0; i < count; i += kLanes) {
        V rows[kLanes];
        const auto some = static_cast<int>(std::min<int64_t>(kLanes, count - i));
        if (some == kLanes) {
          for (int j = 0; j < kLanes; ++j) rows[j] = load<V>(from + j * steps.out + i);
        } else {
          for (int j = 0; j < kLanes; ++j) {
            rows[j] = V{};
            for (int x = 0; x < some; ++x) rows[j][x] = from[j * steps.out + i + x];
          }
        }
        transpose(rows);
        for (int x = 0; x < some; ++x) {
          store(to + (row + inner * run.inner_to) * kBlock + lane, rows[x]);
          if (++inner == run.inner) {
            inner = 0;
            row += run.outer_to;
          }
        }
      }
    }
  }
  for (; lane < lanes; ++lane) {
    for (int64_t t = 0; t < conv.positions(); ++t) {
      const T* from = weight + lane * steps.out + t / conv.kernel[1] * steps.kernel[0] +
                      t % conv.kernel[1] * steps.kernel[1];
      for (int64_t c = 0; c < channels; ++c) {
        to[(t * channels + c) * kBlock + lane] = static_cast<float>(from[c * steps.in]);
      }
    }
  }
}

// weight [K, C, kh, kw] of one group as [block][kh][kw][C][kBlock], zeros beyond K.
template <typename T>
void pack_direct_weight(const ConvParams& conv, const WeightSteps& steps, const T* weight, float* packed) {
  const int64_t size = conv.positions() * conv.group_in() * kBlock, outputs = conv.group_out();
  const WeightRun run(conv, steps);
  at::parallel_for(0, (outputs + kBlock - 1) / kBlock, std::max<int64_t>(1, kGrain / size),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t block = begin; block < end; ++block) {
                       const int64_t k = block * kBlock, lanes = std::min<int64_t>(kBlock, outputs - k);
                       float* to = packed + block * size;
                       if (lanes < kBlock) std::fill_n(to, size, 0.0f);
                       pack_block(conv, steps, run, lanes, weight + k * steps.out, to);
                     }
                   });
}

// acc[i] += `count` products of what lies at pixels[i] + `at`, VECTORS registers of channels each; where the
// next weights are. COUNT is `count` where that is known, else 0: a first layer's runs are too short for a
// loop.
template <int COUNT, int PIXELS, int VECTORS>
DLFAST_INLINE const float* accumulate_run(const float* const (&pixels)[PIXELS], int64_t at, int64_t count,
                                          const float* weight, F (&acc)[PIXELS][VECTORS]) {
  const auto tap = [&](int64_t i) DLFAST_INLINE_LAMBDA {
    F w[VECTORS];
    for (int v = 0; v < VECTORS; ++v) w[v] = load<F>(weight + v * kLanes);
    weight += kBlock;
    for (int q = 0; q < PIXELS; ++q) {
      const F x = broadcast<F>(pixels[q][at + i]);
      for (int v = 0; v < VECTORS; ++v) acc[q][v] = x * w[v] + acc[q][v];
    }
  };
  if constexpr (COUNT > 0) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < COUNT; ++i) tap(i);
  } else {
    for (int64_t i = 0; i < count; ++i) tap(i);
  }
  return weight;
}

// acc[i] += the convolution at the pixel whose first tap is pixels[i]. LENGTH is taps.length.
template <int LENGTH, int PIXELS, int VECTORS>
DLFAST_INLINE void accumulate_runs(const Taps& taps, const float* const (&pixels)[PIXELS],
                                   const float* weight, F (&acc)[PIXELS][VECTORS]) {
  for (int64_t r = 0; r < taps.rows; ++r) {
    for (int64_t s = 0; s < taps.per_row; ++s) {
      weight = accumulate_run<LENGTH>(pixels, r * taps.row_step + s * taps.col_step, LENGTH, weight, acc);
    }
  }
}

// The error of a sum grows with the number of its terms: after so many products a new sum is begun, which
// keeps that of long ones as small as that of short ones.
constexpr int64_t kSumTerms = 256;

template <int PIXELS, int VECTORS>
DLFAST_INLINE void accumulate_in_parts(const Taps& taps, const float* const (&pixels)[PIXELS],
                                       const float* weight, F (&acc)[PIXELS][VECTORS]) {
  F total[PIXELS][VECTORS];
  for (int q = 0; q < PIXELS; ++q) {
    for (int v = 0; v < VECTORS; ++v) total[q][v] = F{};
  }
  int64_t terms = 0;
  for (int64_t r = 0; r < taps.rows; ++r) {
    for (int64_t s = 0; s < taps.per_row; ++s) {
      for (int64_t from = 0; from < taps.length; from += kSumTerms) {
        const int64_t count = std::min(kSumTerms, taps.length - from);
        if (terms + count > kSumTerms) {
          terms = 0;
          for (int q = 0; q < PIXELS; ++q) {
            for (int v = 0; v < VECTORS; ++v) {
              total[q][v] += acc[q][v];
              acc[q][v] = F{};
            }
          }
        }
        weight = accumulate_run<0>(pixels, r * taps.row_step + s * taps.col_step + from, count, weight, acc);
        terms += count;
      }
    }
  }
  for (int q = 0; q < PIXELS; ++q) {
    for (int v = 0; v < VECTORS; ++v) acc[q][v] += total[q][v];
  }
}

template <int PIXELS, int VECTORS>
DLFAST_INLINE void accumulate(const Taps& taps, const float* const (&pixels)[PIXELS], const float* weight,
                              F (&acc)[PIXELS][VECTORS]) {
  switch (taps.length) {
    case 3:  // one channel, 3x3
      return accumulate_runs<3>(taps, pixels, weight, acc);
    case 9:  // three channels, 3x3
      return accumulate_runs<9>(taps, pixels, weight, acc);
    default:
      return accumulate_in_parts(taps, pixels, weight, acc);
  }
}

template <int PIXELS, int VECTORS>
DLFAST_INLINE void start(const float* bias, F (&acc)[PIXELS][VECTORS]) {
  for (int q = 0; q < PIXELS; ++q) {
    for (int v = 0; v < VECTORS; ++v) acc[q][v] = load<F>(bias + v * kLanes);
  }
}

// WINDOWS 2x2 windows side by side, from pooled column px on: all four pixels of each in registers. FINITE
// takes the shorter way to the winners of finite numbers, and leaves a NaN in `doubt` if one was not.
template <bool FINITE, int WINDOWS, int VECTORS>
DLFAST_INLINE void pooled_2x2(const ConvBlockParams& p, const Bands& bands, const Taps& taps,
                              const float* row, const float* weight, const float* bias, int64_t px,
                              int64_t pixel, const PooledTile& tile, F& doubt) {
  const int64_t step_x = p.conv.stride[1] * p.conv.group_in(), step_y = p.conv.stride[0] * bands.row_stride;
  const float* pixels[4 * WINDOWS];
  for (int w = 0; w < WINDOWS; ++w) {
    for (int q = 0; q < 4; ++q) pixels[4 * w + q] = row + (2 * (px + w) + q % 2) * step_x + q / 2 * step_y;
  }
  F acc[4 * WINDOWS][VECTORS];
  start(bias, acc);
  accumulate(taps, pixels, weight, acc);
  for (int w = 0; w < WINDOWS; ++w) {
    Winner<F> winners[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      const F values[4] = {acc[4 * w][v], acc[4 * w + 1][v], acc[4 * w + 2][v], acc[4 * w + 3][v]};
      if constexpr (FINITE) {
        doubt = ((values[0] + values[1]) + (values[2] + values[3])) * 0.0f + doubt;
        winners[v].of_finite(values);
      } else {
        winners[v].start(0);
        for (int q = 0; q < 4; ++q) winners[v].offer(values[q], q);
      }
      if (p.pool.activation == Activation::relu) winners[v].apply_relu();
    }
    tile.put(pixel + w, winners);
  }
}

// One pooled row; false, and the row unusable, if it was to be FINITE and is not.
template <bool FINITE, int VECTORS>
bool row_2x2(const ConvBlockParams& p, const Bands& bands, const Taps& taps, const float* row,
             const float* weight, const float* bias, int64_t pixel, const PooledTile& tile) {
  const int64_t pooled_width = p.pool.output_size[1];
  F doubt{};
  int64_t px = 0;
  if (pooled_width >= kWindows) {
    for (; px < pooled_width; px += kWindows) {
      // The last group steps back over windows already done rather than doing the rest one by one.
      const int64_t at = std::min(px, pooled_width - kWindows);
      pooled_2x2<FINITE, kWindows, VECTORS>(p, bands, taps, row, weight, bias, at, pixel + at, tile, doubt);
    }
  }
  for (; px < pooled_width; ++px) {
    pooled_2x2<FINITE, 1, VECTORS>(p, bands, taps, row, weight, bias, px, pixel + px, tile, doubt);
  }
  return all_zero(doubt);
}

template <int VECTORS>
void band_2x2(const ConvBlockParams& p, const Bands& bands, const Band& band, const Taps& taps,
              const float* packed, const float* weight, const float* bias, const PooledTile& tile) {
  for (int64_t py = 0; py < band.pooled_rows; ++py) {
    const float* row = packed + 2 * py * p.conv.stride[0] * bands.row_stride;
    const int64_t pixel = py * p.pool.output_size[1];
    if (!row_2x2<true, VECTORS>(p, bands, taps, row, weight, bias, pixel, tile)) {
      row_2x2<false, VECTORS>(p, bands, taps, row, weight, bias, pixel, tile);
    }
  }
}

// The convolution rows under a band, for one block of channels: z [conv_rows][conv_cols][kBlock].
template <int VECTORS>
void band_convolution(const ConvBlockParams& p, const Bands& bands, const Band& band, const Taps& taps,
                      const float* packed, const float* weight, const float* bias, float* z) {
  const int64_t step_x = p.conv.stride[1] * p.conv.group_in(), step_y = p.conv.stride[0] * bands.row_stride;
  const auto strip = [&](auto count, int64_t y, int64_t x) DLFAST_INLINE_LAMBDA {
    constexpr int PIXELS = decltype(count)::value;
    const float* pixels[PIXELS];
    for (int q = 0; q < PIXELS; ++q) pixels[q] = packed + y * step_y + (x + q) * step_x;
    F acc[PIXELS][VECTORS];
    start(bias, acc);
    accumulate(taps, pixels, weight, acc);
    float* to = z + (y * bands.conv_cols + x) * kBlock;
    for (int q = 0; q < PIXELS; ++q) {
      for (int v = 0; v < VECTORS; ++v) store(to + q * kBlock + v * kLanes, acc[q][v]);
    }
  };
  for (int64_t y = 0; y < band.conv_rows; ++y) {
    int64_t x = 0;
    if (bands.conv_cols >= kStrip) {
      for (; x < bands.conv_cols; x += kStrip) {
        strip(std::integral_constant<int, kStrip>{}, y, std::min(x, bands.conv_cols - kStrip));
      }
    }
    for (; x < bands.conv_cols; ++x) strip(std::integral_constant<int, 1>{}, y, x);
  }
}

}  // namespace dlfast::DLFAST_LEVEL
