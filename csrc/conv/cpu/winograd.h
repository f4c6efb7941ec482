// The convolution of a band with a 3x3 kernel and stride 1 by Winograd's minimal filtering: fewer
// multiplications.
//
// F(M x M, 3 x 3) computes a tile of M x M outputs from (M+2) x (M+2) inputs with (M+2)^2 multiplications per
// pair of channels instead of 9 M^2: 2.25 times fewer for M = 2, 4 times fewer for M = 4. Per element of the
// transformed tile the sum over channels is a matrix product.
// Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
#pragma once

#include "conv/cpu/band.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/strip.h"
#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

// The matrices of the method as straight-line code on numbers or vectors of them, one dimension at a time.
template <int M>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int kSide = 4;
  template <typename V>
  static DLFAST_INLINE void input(const V (&d)[4], V (&t)[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
  template <typename V>
  static DLFAST_INLINE void weight(const V (&g)[3], V (&t)[4]) {
    const V outer = 0.5f * (g[0] + g[2]), inner = 0.5f * g[1];
    t[0] = g[0];
    t[1] = outer + inner;
    t[2] = outer - inner;
    t[3] = g[2];
  }
  template <typename V>
  static DLFAST_INLINE void output(const V (&m)[4], V (&t)[2]) {
    t[0] = m[0] + m[1] + m[2];
    t[1] = m[1] - m[2] - m[3];
  }
};

// Interpolated at 0, a, -a, b, -b and infinity. With 5/8 and 11/8 rounding errors are four times smaller than
// with the usual 1 and 2, and powers of both are exact in float32. On the choice of points: B. Barabasz et
// al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", TOMS
// 2020.
template <>
struct Winograd<4> {
  static constexpr int kSide = 6;
  static constexpr float a = 0.625f, a2 = a * a, a3 = a * a2;
  static constexpr float b = 1.375f, b2 = b * b, b3 = b * b2;
  // What the columns of the interpolation are divided by.
  static constexpr float by_0 = 1 / (a2 * b2);
  static constexpr float by_a = 1 / (2 * a2 * (a2 - b2)), by_b = 1 / (2 * b2 * (b2 - a2));

  template <typename V>
  static DLFAST_INLINE void input(const V (&d)[6], V (&t)[6]) {
    const V even_a = d[4] - b2 * d[2], odd_a = a * (d[3] - b2 * d[1]);
    const V even_b = d[4] - a2 * d[2], odd_b = b * (d[3] - a2 * d[1]);
    t[0] = (a2 * b2) * d[0] - (a2 + b2) * d[2] + d[4];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = (a2 * b2) * d[1] - (a2 + b2) * d[3] + d[5];
  }
  template <typename V>
  static DLFAST_INLINE void weight(const V (&g)[3], V (&t)[6]) {
    const V even_a = by_a * (g[0] + a2 * g[2]), odd_a = (by_a * a) * g[1];
    const V even_b = by_b * (g[0] + b2 * g[2]), odd_b = (by_b * b) * g[1];
    t[0] = by_0 * g[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[2];
  }
  template <typename V>
  static DLFAST_INLINE void output(const V (&m)[6], V (&t)[4]) {
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const V even_b = m[3] + m[4], odd_b = m[3] - m[4];
    t[0] = m[0] + even_a + even_b;
    t[1] = a * odd_a + b * odd_b;
    t[2] = a2 * even_a + b2 * even_b;
    t[3] = a3 * odd_a + b3 * odd_b + m[5];
  }
};

constexpr int kTileGroup = kLanes == 16 ? 12 : 6;  // tiles multiplied together, as many as registers allow

// weight [K, C, 3, 3] of one group as [block][side * side][C][kBlock], transformed, zeros beyond K.
template <int M, typename T>
void pack_winograd_weight(const ConvParams& conv, const WeightSteps& steps, const T* weight, float* packed) {
  constexpr int kSide = Winograd<M>::kSide;
  constexpr int64_t kChunk =
      16;  // channels, so that what is written lies in runs and not in single registers
  const int64_t channels = conv.group_in(), outputs = conv.group_out();
  const int64_t blocks = (outputs + kBlock - 1) / kBlock, chunks = (channels + kChunk - 1) / kChunk;
  at::parallel_for(0, blocks * chunks, 4, [&](int64_t begin, int64_t end) {
    float gathered[kChunk][9][kBlock], done[kSide * kSide][kChunk][kBlock];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / chunks, first = i % chunks * kChunk;
      const int64_t lanes = std::min<int64_t>(kBlock, outputs - block * kBlock);
      const int64_t count = std::min(kChunk, channels - first);
      if (lanes < kBlock) std::memset(gathered, 0, sizeof(gathered));
      // Output channel by output channel: the same few numbers of all of them often fall into one set of a
      // cache.
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T* from = weight + (block * kBlock + lane) * steps.out + first * steps.in;
        for (int t = 0; t < 9; ++t) {
          const T* tap = from + t / 3 * steps.kernel[0] + t % 3 * steps.kernel[1];
          for (int64_t c = 0; c < count; ++c) gathered[c][t][lane] = static_cast<float>(tap[c * steps.in]);
        }
      }
      for (int64_t c = 0; c < count; ++c) {
        const auto& rows = gathered[c];
        for (int v = 0; v < kBlock; v += kLanes) {
          F half[kSide][3];  // the columns transformed
          for (int x = 0; x < 3; ++x) {
            const F column[3] = {load<F>(rows[x] + v), load<F>(rows[3 + x] + v), load<F>(rows[6 + x] + v)};
            F t[kSide];
            Winograd<M>::weight(column, t);
            for (int y = 0; y < kSide; ++y) half[y][x] = t[y];
          }
          for (int y = 0; y < kSide; ++y) {
            F t[kSide];
            Winograd<M>::weight(half[y], t);
            for (int x = 0; x < kSide; ++x) store(done[y * kSide + x][c] + v, t[x]);
          }
        }
      }
      for (int at = 0; at < kSide * kSide; ++at) {
        std::memcpy(packed + ((block * kSide * kSide + at) * channels + first) * kBlock, done[at],
                    count * kBlock * sizeof(float));
      }
    }
  });
}

// The weights pass by once for all tiles that are transformed together: a part of a band, or several bands,
// where images are small.
struct WinogradWorkspace {
  int64_t tiles;                  // together
  int64_t together;               // bands; more than one only where their tiles fit
  int64_t transformed, products;  // floats

  WinogradWorkspace(const ConvBlockParams& p, const Bands& bands, int64_t threads) {
    const int64_t side = p.tile() + 2, channels = p.conv.group_in();
    const int64_t all = p.conv.batch * bands.per_image, in_band = bands.tiles();
    const bool cached = side * side * channels * p.conv.group_out() <= kCachedWeights;
    const int64_t wanted = std::max(kTransformedFloats / (side * side * channels), kWinogradTiles);
    // Parts of even size, as many for every thread, none larger than half as much again.
    const auto nearest = [](int64_t n, int64_t size) { return std::max<int64_t>(1, (n + size / 2) / size); };
    const auto even = [](int64_t n, int64_t parts) { return (n + parts - 1) / parts; };
    const int64_t units = threads * nearest(all * in_band, wanted * threads);
    together = cached ? 1 : std::max<int64_t>(1, std::min(even(all, units), wanted * 3 / 2 / in_band));
    tiles = together > 1 ? together * in_band : even(in_band, nearest(in_band, wanted));
    transformed = whole_lines(side * side * tiles * channels);
    products = side * side * tiles * kBlock;
  }
  static constexpr int64_t kTransformedFloats = 48 * 1024;  // a good part of a second-level cache
  static constexpr int64_t kCachedWeights = 256 * 1024;     // so few that they come fast each time
};

// The tiles [first, first + count) of a band, transformed: to [side * side][plane / C][C].
template <int M>
void transform_input(const Bands& bands, int64_t channels, const float* packed, int64_t first, int64_t count,
                     int64_t plane, float* to) {
  constexpr int kSide = Winograd<M>::kSide;
  const int64_t per_row = bands.conv_cols / M;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y0 = (first + i) / per_row * M, x0 = (first + i) % per_row * M;
    const float* from = packed + y0 * bands.row_stride + x0 * channels;
    const auto channels_at = [&](auto n, int64_t c) DLFAST_INLINE_LAMBDA {
      using V = Vec<float, decltype(n)::value>;
      V half[kSide][kSide];  // the columns transformed
      for (int x = 0; x < kSide; ++x) {
        V column[kSide], t[kSide];
        for (int y = 0; y < kSide; ++y) column[y] = load<V>(from + y * bands.row_stride + x * channels + c);
        Winograd<M>::input(column, t);
        for (int y = 0; y < kSide; ++y) half[y][x] = t[y];
      }
      for (int y = 0; y < kSide; ++y) {
        V t[kSide];
        Winograd<M>::input(half[y], t);
        for (int x = 0; x < kSide; ++x) store(to + (y * kSide + x) * plane + i * channels + c, t[x]);
      }
    };
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) channels_at(std::integral_constant<int, kLanes>{}, c);
    for (; c < channels; ++c) channels_at(std::integral_constant<int, 1>{}, c);
  }
}

// products [TILES][kBlock] = transformed [TILES][C] * weight [C][kBlock]
template <int TILES, int VECTORS>
DLFAST_INLINE void multiply_tiles(const float* transformed, const float* weight, int64_t channels,
                                  float* products) {
  F acc[TILES][VECTORS] = {};
  for (int64_t c = 0; c < channels; ++c) {
    F w[VECTORS];
    for (int v = 0; v < VECTORS; ++v) w[v] = load<F>(weight + c * kBlock + v * kLanes);
    for (int t = 0; t < TILES; ++t) {
      const F x = broadcast<F>(transformed[t * channels + c]);
      for (int v = 0; v < VECTORS; ++v) acc[t][v] = x * w[v] + acc[t][v];
    }
  }
  for (int t = 0; t < TILES; ++t) {
    for (int v = 0; v < VECTORS; ++v) store(products + t * kBlock + v * kLanes, acc[t][v]);
  }
}

// The same for all elements of `count` tiles: products [side * side][count][kBlock], the weight that of a
// block.
template <int M, int VECTORS>
void multiply_block(const float* transformed, const float* weight, int64_t channels, int64_t count,
                    float* products) {
  constexpr int kSide = Winograd<M>::kSide;
  for (int at = 0; at < kSide * kSide; ++at) {
    const float* w = weight + at * kBlock * channels;
    const float* from = transformed + at * count * channels;
    float* to = products + at * count * kBlock;
    int64_t t = 0;
    if (count >= kTileGroup) {
      for (; t < count; t += kTileGroup) {
        // The last group steps back over tiles already done rather than doing the rest one by one.
        const int64_t i = std::min(t, count - kTileGroup);
        multiply_tiles<kTileGroup, VECTORS>(from + i * channels, w, channels, to + i * kBlock);
      }
    }
    for (; t < count; ++t) multiply_tiles<1, VECTORS>(from + t * channels, w, channels, to + t * kBlock);
  }
}

// The tiles [first, first + count) of a band back from products [side * side][plane / kBlock][kBlock] to the
// strip z; false where a number of it is not finite: an infinity or a NaN spreads over its whole tile here,
// beyond the outputs that it would reach directly.
template <int M, int VECTORS>
bool transform_output(const Bands& bands, const float* products, const float* bias, int64_t first,
                      int64_t count, int64_t plane, float* z) {
  constexpr int kSide = Winograd<M>::kSide;
  const int64_t per_row = bands.conv_cols / M;
  F doubt{};  // 0 * z: NaN once z is not finite
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y0 = (first + i) / per_row * M, x0 = (first + i) % per_row * M;
    float* to = z + (y0 * bands.conv_cols + x0) * kBlock;
    for (int v = 0; v < VECTORS * kLanes; v += kLanes) {
      const float* from = products + i * kBlock + v;
      const F b = load<F>(bias + v);
      F half[M][kSide];
      for (int x = 0; x < kSide; ++x) {
        F column[kSide], t[M];
        for (int y = 0; y < kSide; ++y) column[y] = load<F>(from + (y * kSide + x) * plane);
        Winograd<M>::output(column, t);
        for (int y = 0; y < M; ++y) half[y][x] = t[y];
      }
      for (int y = 0; y < M; ++y) {
        F t[M];
        Winograd<M>::output(half[y], t);
        for (int x = 0; x < M; ++x) {
          const F value = t[x] + b;
          doubt = value * 0.0f + doubt;
          store(to + (y * bands.conv_cols + x) * kBlock + v, value);
        }
      }
    }
  }
  return all_zero(doubt);
}

}  // namespace dlfast::DLFAST_LEVEL
