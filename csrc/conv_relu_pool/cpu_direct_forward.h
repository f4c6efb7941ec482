// The fused forward: convolution, bias, ReLU and pooling of float32, without the convolution output.
//
// Output channels lie in the vector lanes, two registers of them at a time; the accumulators of a few pixels
// stay in registers over all taps. For a 2x2 window with stride 2 those pixels are whole windows, pooled
// where they are; other windows go through a strip of convolution rows that stays in cache.
#pragma once

namespace dlfast::DLFAST_LEVEL {

constexpr int kBlock = 2 * kLanes;  // output channels computed together

// Enough independent accumulators to hide the latency of a multiply-add, few enough to stay in registers.
constexpr int kStrip = kLanes == 16 ? 12 : 6;   // pixels of a row
constexpr int kWindows = kLanes == 16 ? 3 : 1;  // 2x2 windows

// weight [K, C, kh, kw] as [block][kh][kw][C][kBlock], zeros beyond K.
inline void pack_weight(const ConvParams& conv, const float* weight, float* packed) {
  const int64_t channels = conv.in_channels, taps = conv.kernel[0] * conv.kernel[1];
  const int64_t blocks = (conv.out_channels + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / (taps * channels * kBlock)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t block = begin; block < end; ++block) {
                       float* to = packed + block * taps * channels * kBlock;
                       for (int64_t t = 0; t < taps; ++t) {
                         for (int64_t c = 0; c < channels; ++c) {
                           for (int64_t lane = 0; lane < kBlock; ++lane) {
                             const int64_t k = block * kBlock + lane;
                             *to++ = k < conv.out_channels ? weight[(k * channels + c) * taps + t] : 0.0f;
                           }
                         }
                       }
                     }
                   });
}

// acc[i] += the convolution at the pixel whose first tap is pixels[i]; VECTORS registers of channels each.
// LENGTH is taps.length where that is known, else 0: a first layer's runs are too short for a loop.
template <int LENGTH, int PIXELS, int VECTORS>
DLFAST_INLINE void accumulate_runs(const Taps& taps, const float* const (&pixels)[PIXELS],
                                   const float* weight, F (&acc)[PIXELS][VECTORS]) {
  for (int64_t r = 0; r < taps.rows; ++r) {
    for (int64_t s = 0; s < taps.per_row; ++s) {
      const int64_t run = r * taps.row_step + s * taps.col_step;
      const auto tap = [&](int64_t i) DLFAST_INLINE_LAMBDA {
        F w[VECTORS];
        for (int v = 0; v < VECTORS; ++v) w[v] = load<F>(weight + v * kLanes);
        weight += kBlock;
        for (int q = 0; q < PIXELS; ++q) {
          const F x = broadcast<F>(pixels[q][run + i]);
          for (int v = 0; v < VECTORS; ++v) acc[q][v] = x * w[v] + acc[q][v];
        }
      };
      if constexpr (LENGTH > 0) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < LENGTH; ++i) tap(i);
      } else {
        for (int64_t i = 0; i < taps.length; ++i) tap(i);
      }
    }
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
      return accumulate_runs<0>(taps, pixels, weight, acc);
  }
}

template <int PIXELS, int VECTORS>
DLFAST_INLINE void start(const float* bias, F (&acc)[PIXELS][VECTORS]) {
  for (int q = 0; q < PIXELS; ++q) {
    for (int v = 0; v < VECTORS; ++v) acc[q][v] = load<F>(bias + v * kLanes);
  }
}

// Where a block of channels of the pooled rows goes: straight to a channels_last output, or to a tile that
// `flush` turns into rows of a contiguous one.
struct PooledTile {
  float* y;
  uint8_t* code;         // null if not wanted
  int64_t pixel_stride;  // between pooled pixels, in elements
  int64_t channels;      // of the block that exist

  template <int VECTORS>
  DLFAST_INLINE void put(int64_t pixel, const Winner<F> (&winners)[VECTORS]) const {
    if (channels >= VECTORS * kLanes || pixel_stride == kBlock) {
      for (int v = 0; v < VECTORS; ++v) {
        store(y + pixel * pixel_stride + v * kLanes, winners[v].value);
        if (code != nullptr) store_code(code + pixel * pixel_stride + v * kLanes, winners[v].position);
      }
      return;
    }
    float values[kBlock];
    uint8_t codes[kBlock];
    for (int v = 0; v < VECTORS; ++v) {
      store(values + v * kLanes, winners[v].value);
      store_code(codes + v * kLanes, winners[v].position);
    }
    std::memcpy(y + pixel * pixel_stride, values, channels * sizeof(float));
    if (code != nullptr) std::memcpy(code + pixel * pixel_stride, codes, channels);
  }
};

// tile [pixels][kBlock] to planes of a contiguous tensor, `plane` elements apart.
template <typename T>
void flush(const T* tile, int64_t pixels, int64_t channels, T* out, int64_t plane) {
  for (int64_t k = 0; k < channels; ++k) {
    for (int64_t i = 0; i < pixels; ++i) out[k * plane + i] = tile[i * kBlock + k];
  }
}

// `windows` 2x2 windows side by side, from pooled column px on: all four pixels of each in registers.
template <int WINDOWS, int VECTORS>
DLFAST_INLINE void pooled_2x2(const ConvBlockParams& p, const Bands& bands, const Taps& taps,
                              const float* row, const float* weight, const float* bias, int64_t px,
                              int64_t pixel, const PooledTile& tile) {
  const int64_t step_x = p.conv.stride[1] * p.conv.in_channels, step_y = p.conv.stride[0] * bands.row_stride;
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
      winners[v].start(0);
      for (int q = 0; q < 4; ++q) winners[v].offer(acc[4 * w + q][v], q);
      if (p.pool.activation == Activation::relu) winners[v].apply_relu();
    }
    tile.put(pixel + w, winners);
  }
}

template <int VECTORS>
void band_2x2(const ConvBlockParams& p, const Bands& bands, const Band& band, const Taps& taps,
              const float* packed, const float* weight, const float* bias, const PooledTile& tile) {
  const int64_t pooled_width = p.pool.output_size[1];
  for (int64_t py = 0; py < band.pooled_rows; ++py) {
    const float* row = packed + 2 * py * p.conv.stride[0] * bands.row_stride;
    const int64_t pixel = py * pooled_width;
    int64_t px = 0;
    if (pooled_width >= kWindows) {
      for (; px < pooled_width; px += kWindows) {
        // The last group steps back over windows already done rather than doing the rest one by one.
        const int64_t at = std::min(px, pooled_width - kWindows);
        pooled_2x2<kWindows, VECTORS>(p, bands, taps, row, weight, bias, at, pixel + at, tile);
      }
    }
    for (; px < pooled_width; ++px) {
      pooled_2x2<1, VECTORS>(p, bands, taps, row, weight, bias, px, pixel + px, tile);
    }
  }
}

// The convolution rows under a band, for one block of channels: z [conv_rows][conv_cols][kBlock].
template <int VECTORS>
void band_convolution(const ConvBlockParams& p, const Bands& bands, const Band& band, const Taps& taps,
                      const float* packed, const float* weight, const float* bias, float* z) {
  const int64_t step_x = p.conv.stride[1] * p.conv.in_channels, step_y = p.conv.stride[0] * bands.row_stride;
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

// Pools the strip of convolution rows z into the tile.
template <int VECTORS>
void band_pool(const ConvBlockParams& p, const Bands& bands, const Band& band, const float* z,
               const PooledTile& tile) {
  const ReluPoolParams& pool = p.pool;
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

struct ForwardScratch {
  int64_t weight, bias, input, z, y, code;  // floats; the last four per thread

  explicit ForwardScratch(const ConvBlockParams& p) {
    const Bands bands(p);
    const int64_t blocks = (p.conv.out_channels + kBlock - 1) / kBlock;
    const int64_t pooled = bands.pooled_rows * p.pool.output_size[1];
    weight = blocks * kBlock * p.conv.kernel[0] * p.conv.kernel[1] * p.conv.in_channels;
    bias = blocks * kBlock;
    input = bands.input_floats();
    z = bands.conv_rows * bands.conv_cols * kBlock;
    y = p.pool.channels_last ? 0 : pooled * kBlock;
    code = y / 4;  // one byte an element
  }
  int64_t per_thread() const { return input + z + y + code; }
};

int64_t direct_forward_scratch(const ConvBlockParams& p, int64_t threads) {
  const ForwardScratch scratch(p);
  return scratch.weight + scratch.bias + threads * scratch.per_thread();
}

void direct_forward(const ConvBlockParams& p, const float* input, const float* weight, const float* bias,
                    float* y, uint8_t* code, float* scratch) {
  const ForwardScratch sizes(p);
  const Bands bands(p);
  const Taps taps(p, bands);
  const int64_t out_channels = p.conv.out_channels;
  const int64_t blocks = (out_channels + kBlock - 1) / kBlock;
  const int64_t block_weight = sizes.weight / blocks;
  const int64_t plane = p.pool.output_size[0] * p.pool.output_size[1];

  float* packed_weight = scratch;
  float* packed_bias = packed_weight + sizes.weight;
  pack_weight(p.conv, weight, packed_weight);
  std::fill_n(packed_bias, sizes.bias, 0.0f);
  if (bias != nullptr) std::copy_n(bias, out_channels, packed_bias);

  const PoolWindow& window = p.pool.window;
  const bool in_registers = p.pool.pool == Pool::max && window.size[0] == 2 && window.size[1] == 2 &&
                            window.stride[0] == 2 && window.stride[1] == 2 && window.padding[0] == 0 &&
                            window.padding[1] == 0 && bands.conv_cols == 2 * p.pool.output_size[1] &&
                            2 * p.pool.output_size[0] <= p.pool.input_size[0];

  at::parallel_for(0, p.conv.batch * bands.per_image, 1, [&](int64_t begin, int64_t end) {
    float* packed = packed_bias + sizes.bias + at::get_thread_num() * sizes.per_thread();
    float* z = packed + sizes.input;
    float* y_tile = z + sizes.z;
    uint8_t* code_tile = reinterpret_cast<uint8_t*>(y_tile + sizes.y);
    for (int64_t index = begin; index < end; ++index) {
      const Band band(p, bands, index);
      pack_input(p, bands, band, input, packed);
      const int64_t pixels = band.pooled_rows * p.pool.output_size[1];
      const int64_t first = band.first_pooled * p.pool.output_size[1];
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t k = block * kBlock, channels = std::min<int64_t>(kBlock, out_channels - k);
        const float* w = packed_weight + block * block_weight;
        const float* b = packed_bias + k;
        PooledTile tile{y_tile, code == nullptr ? nullptr : code_tile, kBlock, channels};
        if (p.pool.channels_last) {
          const int64_t at = (band.image * plane + first) * out_channels + k;
          tile = {y + at, code == nullptr ? nullptr : code + at, out_channels, channels};
        }
        const auto run = [&](auto vectors) {
          constexpr int VECTORS = decltype(vectors)::value;
          if (in_registers) return band_2x2<VECTORS>(p, bands, band, taps, packed, w, b, tile);
          band_convolution<VECTORS>(p, bands, band, taps, packed, w, b, z);
          band_pool<VECTORS>(p, bands, band, z, tile);
        };
        if (channels > kLanes) {
          run(std::integral_constant<int, 2>{});
        } else {
          run(std::integral_constant<int, 1>{});
        }
        if (!p.pool.channels_last) {
          const int64_t at = (band.image * out_channels + k) * plane + first;
          flush(y_tile, pixels, channels, y + at, plane);
          if (code != nullptr) flush(code_tile, pixels, channels, code + at, plane);
        }
      }
    }
  });
}

}  // namespace dlfast::DLFAST_LEVEL
