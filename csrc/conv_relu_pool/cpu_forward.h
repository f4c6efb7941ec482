// The fused forward: convolution, bias, ReLU and pooling, the convolution output never leaving the cache.
//
// A unit of work is a band of one image and one group of channels. Its input is packed, its convolution
// computed directly or by Winograd's method, pooled, and written in the layout and dtype of the output.
#pragma once

namespace dlfast::DLFAST_LEVEL {

struct ForwardScratch {
  int64_t weight, bias;                      // floats, of all groups, shared
  int64_t input, winograd, z, y, code;       // floats, per thread
  int64_t group_weight, group_bias, blocks;  // of one group

  ForwardScratch(const ConvBlockParams& p, const Bands& bands, const WinogradScratch& tiles,
                 bool through_tile) {
    const int64_t pooled = bands.pooled_rows * p.pool.output_size[1];
    const int64_t side = p.tile() + 2, taps = p.tile() == 1 ? p.conv.positions() : side * side;
    blocks = (p.conv.group_out() + kBlock - 1) / kBlock;
    group_weight = blocks * kBlock * taps * p.conv.group_in();
    group_bias = blocks * kBlock;
    weight = p.conv.groups * group_weight;
    bias = p.conv.groups * group_bias;
    input = whole_lines(bands.input_floats());
    winograd = p.tile() == 1 ? 0 : tiles.transformed + tiles.products;
    // All blocks of channels wait there where the tiles of a band come in parts.
    z = bands.conv_rows * bands.conv_cols * kBlock * (tiles.tiles < bands.tiles() ? blocks : 1);
    y = through_tile ? pooled * kBlock : 0;
    code = whole_lines(y / 4);  // one byte an element
  }
  int64_t per_thread() const { return input + winograd + z + y + code; }
};

// Only float32 pixels of channels can be written where they belong; all else goes through a tile.
template <typename T>
bool goes_through_tile(const ConvBlockParams& p) {
  return !p.pool.channels_last || !std::is_same_v<T, float>;
}

int64_t forward_scratch(const ConvBlockParams& p, Dtype dtype, int64_t threads) {
  const bool through_tile = !p.pool.channels_last || dtype != Dtype::float32;
  const Bands bands(p);
  const ForwardScratch sizes(p, bands, WinogradScratch(p, bands, threads), through_tile);
  return sizes.weight + sizes.bias + threads * sizes.per_thread();
}

// What a band's input is packed from: a tensor, whose first number this is.
template <typename T>
struct DenseSource {
  const T* input;

  void pack(const ConvBlockParams& p, const Bands& bands, const Band& band, int64_t group,
            float* packed) const {
    pack_input(p, bands, band, input + group * p.conv.group_in() * p.input_strides[1], packed);
  }
};

// T is the dtype of y.
template <typename T, typename Source>
struct Forward {
  const ConvBlockParams& p;
  const Source source;
  T* y;
  uint8_t* code;  // null if not wanted
  const Bands bands;
  const Taps taps;
  const WinogradScratch winograd;
  const ForwardScratch sizes;
  const bool in_registers;

  Forward(const ConvBlockParams& p_, const Source& source_, T* y_, uint8_t* code_)
      : p(p_),
        source(source_),
        y(y_),
        code(code_),
        bands(p_),
        taps(p_, bands),
        winograd(p_, bands, at::get_num_threads()),
        sizes(p_, bands, winograd, goes_through_tile<T>(p_)),
        in_registers(p_.tile() == 1 && is_pool_2x2(p_.pool)) {}

  int64_t bands_together() const { return p.tile() == 1 ? 1 : winograd.together; }
  int64_t units() const {
    const int64_t all = p.conv.batch * bands.per_image, together = bands_together();
    return (all + together - 1) / together * p.conv.groups;
  }

  // Some bands of one group; false where Winograd's sums overflow.
  bool unit(int64_t index, const float* weights, const float* biases, float* scratch) const {
    const int64_t group = index % p.conv.groups, first = index / p.conv.groups * bands_together();
    const int64_t last = std::min(first + bands_together(), p.conv.batch * bands.per_image);
    const float* weight = weights + group * sizes.group_weight;
    const float* bias = biases + group * sizes.group_bias;
    if (p.tile() == 2) return winograd_unit<2>(group, first, last, weight, bias, scratch);
    if (p.tile() == 4) return winograd_unit<4>(group, first, last, weight, bias, scratch);
    const Band band(p, bands, first);
    source.pack(p, bands, band, group, scratch);
    for_blocks([&](auto vectors, int64_t block) {
      channel_block<decltype(vectors)::value>(band, group, block, scratch, weight, bias, 0);
    });
    return true;
  }

  // Runs body(vectors, block) for every block of channels, `vectors` being the registers that it has.
  template <typename Body>
  void for_blocks(const Body& body) const {
    for (int64_t block = 0; block < sizes.blocks; ++block) {
      if (p.conv.group_out() - block * kBlock > kLanes) {
        body(std::integral_constant<int, 2>{}, block);
      } else {
        body(std::integral_constant<int, 1>{}, block);
      }
    }
  }

  // The bands [first, last).
  template <int M>
  bool winograd_unit(int64_t group, int64_t first, int64_t last, const float* weight, const float* bias,
                     float* scratch) const {
    const int64_t channels = p.conv.group_in(), block_weight = sizes.group_weight / sizes.blocks;
    const int64_t strip = bands.conv_rows * bands.conv_cols * kBlock;
    float* transformed = scratch + sizes.input;
    float* products = transformed + winograd.transformed;
    float* z = transformed + sizes.winograd;
    bool finite = true;
    const auto tiles_of = [&](const Band& band) { return band.conv_rows * bands.conv_cols / (M * M); };
    // Products of a block of channels with `count` tiles.
    const auto multiply = [&](auto vectors, int64_t block, int64_t count) {
      multiply_block<M, decltype(vectors)::value>(transformed, weight + block * block_weight, channels, count,
                                                  products);
    };

    if (winograd.tiles < bands.tiles()) {
      const Band band(p, bands, first);
      source.pack(p, bands, band, group, scratch);
      for (int64_t from = 0; from < tiles_of(band); from += winograd.tiles) {
        const int64_t count = std::min(winograd.tiles, tiles_of(band) - from);
        transform_input<M>(bands, channels, scratch, from, count, count * channels, transformed);
        for_blocks([&](auto vectors, int64_t block) {
          multiply(vectors, block, count);
          finite &= transform_output<M, decltype(vectors)::value>(
              bands, products, bias + block * kBlock, from, count, count * kBlock, z + block * strip);
        });
      }
      for_blocks([&](auto vectors, int64_t block) {
        channel_block<decltype(vectors)::value>(band, group, block, scratch, weight, bias, block * strip);
      });
      return finite;
    }

    int64_t count = 0;
    for (int64_t index = first; index < last; ++index) count += tiles_of(Band(p, bands, index));
    int64_t at = 0;
    for (int64_t index = first; index < last; ++index) {
      const Band band(p, bands, index);
      source.pack(p, bands, band, group, scratch);
      transform_input<M>(bands, channels, scratch, 0, tiles_of(band), count * channels,
                         transformed + at * channels);
      at += tiles_of(band);
    }
    for_blocks([&](auto vectors, int64_t block) {
      constexpr int VECTORS = decltype(vectors)::value;
      multiply(vectors, block, count);
      at = 0;
      for (int64_t index = first; index < last; ++index) {
        const Band band(p, bands, index);
        finite &= transform_output<M, VECTORS>(bands, products + at * kBlock, bias + block * kBlock, 0,
                                               tiles_of(band), count * kBlock, z);
        channel_block<VECTORS>(band, group, block, scratch, weight, bias, 0);
        at += tiles_of(band);
      }
    });
    return finite;
  }

  // One block of channels of a band from its packed input, or from the strip that Winograd's method has left
  // at `strip` of z. weight and bias are those of the group.
  template <int VECTORS>
  void channel_block(const Band& band, int64_t group, int64_t block, float* scratch, const float* weight,
                     const float* bias, int64_t strip) const {
    const int64_t channels = std::min<int64_t>(kBlock, p.conv.group_out() - block * kBlock);
    const float* packed = scratch;
    float* z = scratch + sizes.input + sizes.winograd + strip;
    float* y_tile = scratch + sizes.input + sizes.winograd + sizes.z;
    const int64_t plane = p.pool.output_size[0] * p.pool.output_size[1], total = p.conv.out_channels;
    const int64_t pixels = band.pooled_rows * p.pool.output_size[1];
    const int64_t k = group * p.conv.group_out() + block * kBlock;
    const int64_t first = band.first_pooled * p.pool.output_size[1];
    const int64_t channel_stride = p.pool.channels_last ? 1 : plane;
    const int64_t pixel_stride = p.pool.channels_last ? total : 1;
    const int64_t at = band.image * total * plane + k * channel_stride + first * pixel_stride;

    PooledTile tile{y_tile, reinterpret_cast<uint8_t*>(y_tile + sizes.y), kBlock, channels, true};
    if constexpr (std::is_same_v<T, float>) {
      if (p.pool.channels_last) {
        tile = {y + at, code == nullptr ? nullptr : code + at, total, channels, false};
      }
    }
    if (code == nullptr) tile.code = nullptr;

    const float* w = weight + block * (sizes.group_weight / sizes.blocks);
    const float* b = bias + block * kBlock;
    if (in_registers) {
      band_2x2<VECTORS>(p, bands, band, taps, packed, w, b, tile);
    } else {
      if (p.tile() == 1) band_convolution<VECTORS>(p, bands, band, taps, packed, w, b, z);
      finish_strip<VECTORS>(p.pool, bands, band, z, tile);
    }
    if (goes_through_tile<T>(p)) {
      flush(tile.y, pixels, channels, y + at, channel_stride, pixel_stride);
      if (code != nullptr) flush(tile.code, pixels, channels, code + at, channel_stride, pixel_stride);
    }
  }
};

template <typename T, typename Source>
bool forward_of(const ConvBlockParams& p, const WeightSteps& steps, const Source& source, const T* weight,
                const T* bias, T* y, uint8_t* code, float* scratch) {
  const Forward<T, Source> forward(p, source, y, code);
  const ForwardScratch& sizes = forward.sizes;
  const int64_t groups = p.conv.groups, outputs = p.conv.group_out();
  float* packed_weight = scratch;
  float* packed_bias = packed_weight + sizes.weight;
  float* own = packed_bias + sizes.bias;
  for (int64_t group = 0; group < groups; ++group) {
    const T* from = weight + group * steps.group;
    float* to = packed_weight + group * sizes.group_weight;
    if (p.tile() == 1) pack_direct_weight(p.conv, steps, from, to);
    if (p.tile() == 2) pack_winograd_weight<2>(p.conv, steps, from, to);
    if (p.tile() == 4) pack_winograd_weight<4>(p.conv, steps, from, to);
    float* group_bias = packed_bias + group * sizes.group_bias;
    std::fill_n(group_bias, sizes.group_bias, 0.0f);
    if (bias != nullptr) convert(bias + group * outputs, outputs, group_bias);
  }

  std::atomic<bool> finite{true};
  at::parallel_for(0, forward.units(), 1, [&](int64_t begin, int64_t end) {
    float* thread_scratch = own + at::get_thread_num() * sizes.per_thread();
    for (int64_t index = begin; index < end; ++index) {
      if (!forward.unit(index, packed_weight, packed_bias, thread_scratch)) finite = false;
    }
  });
  return finite;
}

bool forward(const ConvBlockParams& p, const WeightSteps& steps, Dtype dtype, const void* input,
             const void* weight, const void* bias, void* y, uint8_t* code, float* scratch) {
  return dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    return forward_of(p, steps, DenseSource<T>{static_cast<const T*>(input)}, static_cast<const T*>(weight),
                      static_cast<const T*>(bias), static_cast<T*>(y), code, scratch);
  });
}

// The gradient of max pooling as the input of a convolution; grad and code are channels_last.
template <typename T>
struct PooledSource {
  const ReluPoolParams& pool;
  const T* grad;
  const uint8_t* code;

  void pack(const ConvBlockParams& p, const Bands& bands, const Band& band, int64_t group,
            float* packed) const {
    const int64_t top = band.first_conv - p.conv.padding[0], left = p.conv.padding[1];
    const int64_t inside = std::min(p.conv.input_size[1], bands.cols - left);
    for (int64_t r = 0; r < band.conv_rows + p.conv.kernel[0] - 1; ++r) {
      float* row = packed + r * bands.row_stride;
      std::memset(row, 0, bands.row_stride * sizeof(float));
      const int64_t y = top + r;
      if (y < 0 || y >= p.conv.input_size[0]) continue;
      const Span windows = windows_over(pool, 0, y);
      for (int64_t py = windows.begin; py < windows.end; ++py) {
        add_windows(p, band.image, group, py, y - window_span(pool, 0, py).origin, inside,
                    row + left * p.conv.group_in());
      }
    }
  }

  // Row `kh` of the windows of pooled row py to the first `inside` pixels of a row.
  void add_windows(const ConvBlockParams& p, int64_t image, int64_t group, int64_t py, int64_t kh,
                   int64_t inside, float* row) const {
    const int64_t channels = p.conv.group_in(), width = pool.output_size[1];
    for (int64_t px = 0; px < width; ++px) {
      const int64_t pixel =
          ((image * pool.output_size[0] + py) * width + px) * pool.channels + group * channels;
      const int64_t origin = window_span(pool, 1, px).origin;
      const int64_t first = std::max<int64_t>(origin, 0),
                    last = std::min(origin + pool.window.size[1], inside);
      for (int64_t x = first; x < last; ++x) {
        const int64_t position = kh * pool.window.size[1] + x - origin;
        float* to = row + x * channels;
        const auto add = [&](auto n, int64_t c) DLFAST_INLINE_LAMBDA {
          constexpr int N = decltype(n)::value;
          using Codes = Vec<int32_t, N>;
          const Codes won = convert_integers<Codes>(load<Vec<uint8_t, N>>(code + pixel + c));
          const auto g = load_compute<N>(grad + pixel + c);
          const auto passing = won == static_cast<int32_t>(position) ? g : decltype(g){};
          store(to + c, load<Vec<float, N>>(to + c) + passing);
        };
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) add(std::integral_constant<int, kLanes>{}, c);
        for (; c < channels; ++c) add(std::integral_constant<int, 1>{}, c);
      }
    }
  }
};

bool forward_from_pooled(const ConvBlockParams& p, const ReluPoolParams& pool, const WeightSteps& steps,
                         Dtype dtype, const void* grad_y, const uint8_t* code, const void* weight, void* y,
                         float* scratch) {
  return dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    return forward_of(p, steps, PooledSource<T>{pool, static_cast<const T*>(grad_y), code},
                      static_cast<const T*>(weight), static_cast<const T*>(nullptr), static_cast<T*>(y),
                      nullptr, scratch);
  });
}

}  // namespace dlfast::DLFAST_LEVEL
