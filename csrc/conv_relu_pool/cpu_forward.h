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

  ForwardScratch(const ConvBlockParams& p, const Bands& bands, bool through_tile) {
    const int64_t pooled = bands.pooled_rows * p.pool.output_size[1];
    const int64_t side = p.tile() + 2, taps = p.tile() == 1 ? p.conv.positions() : side * side;
    blocks = (p.conv.group_out() + kBlock - 1) / kBlock;
    group_weight = blocks * kBlock * taps * p.conv.group_in();
    group_bias = blocks * kBlock;
    weight = p.conv.groups * group_weight;
    bias = p.conv.groups * group_bias;
    input = bands.input_floats();
    const WinogradScratch tiles(p, bands);
    winograd = p.tile() == 1 ? 0 : tiles.transformed + tiles.products;
    z = bands.conv_rows * bands.conv_cols * kBlock * (p.tile() == 1 ? 1 : blocks);
    y = through_tile ? pooled * kBlock : 0;
    code = y / 4;  // one byte an element
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
  const ForwardScratch sizes(p, Bands(p), through_tile);
  return sizes.weight + sizes.bias + threads * sizes.per_thread();
}

template <typename T>
struct Forward {
  const ConvBlockParams& p;
  const T* input;
  T* y;
  uint8_t* code;  // null if not wanted
  const Bands bands;
  const Taps taps;
  const ForwardScratch sizes;
  const WinogradScratch winograd;
  const bool in_registers;

  Forward(const ConvBlockParams& p_, const T* input_, T* y_, uint8_t* code_)
      : p(p_),
        input(input_),
        y(y_),
        code(code_),
        bands(p_),
        taps(p_, bands),
        sizes(p_, bands, goes_through_tile<T>(p_)),
        winograd(p_, bands),
        in_registers(p_.tile() == 1 && is_pool_2x2(p_.pool)) {}

  // Weight and bias of a group start at `weight` and `bias`, packed; false where Winograd's sums overflow.
  bool unit(int64_t index, const float* weights, const float* biases, float* scratch) const {
    const int64_t group = index % p.conv.groups;
    const Band band(p, bands, index / p.conv.groups);
    const float* weight = weights + group * sizes.group_weight;
    const float* bias = biases + group * sizes.group_bias;
    float* packed = scratch;
    float* tiles = packed + sizes.input;
    float* z = tiles + sizes.winograd;
    float* tile = z + sizes.z;
    pack_input(p, bands, band, input + group * p.conv.group_in() * p.input_strides[1], packed);

    bool finite = true;
    if (p.tile() == 2) finite = band_winograd<2>(p, bands, band, winograd, packed, weight, bias, tiles, z);
    if (p.tile() == 4) finite = band_winograd<4>(p, bands, band, winograd, packed, weight, bias, tiles, z);
    for (int64_t block = 0; block < sizes.blocks; ++block) {
      const int64_t channels = std::min<int64_t>(kBlock, p.conv.group_out() - block * kBlock);
      const float* w = weight + block * (sizes.group_weight / sizes.blocks);
      const float* b = bias + block * kBlock;
      if (channels > kLanes) {
        channel_block<2>(band, group, block, channels, packed, w, b, z, tile);
      } else {
        channel_block<1>(band, group, block, channels, packed, w, b, z, tile);
      }
    }
    return finite;
  }

  template <int VECTORS>
  void channel_block(const Band& band, int64_t group, int64_t block, int64_t channels, const float* packed,
                     const float* weight, const float* bias, float* z, float* y_tile) const {
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

    if (in_registers) {
      band_2x2<VECTORS>(p, bands, band, taps, packed, weight, bias, tile);
    } else {
      if (p.tile() == 1) {
        band_convolution<VECTORS>(p, bands, band, taps, packed, weight, bias, z);
      } else {
        z += block * bands.conv_rows * bands.conv_cols * kBlock;
      }
      finish_strip<VECTORS>(p.pool, bands, band, z, tile);
    }
    if (goes_through_tile<T>(p)) {
      flush(tile.y, pixels, channels, y + at, channel_stride, pixel_stride);
      if (code != nullptr) flush(tile.code, pixels, channels, code + at, channel_stride, pixel_stride);
    }
  }
};

template <typename T>
bool forward_of(const ConvBlockParams& p, const WeightSteps& steps, const T* input, const T* weight,
                const T* bias, T* y, uint8_t* code, float* scratch) {
  const Forward<T> forward(p, input, y, code);
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
  at::parallel_for(0, p.conv.batch * forward.bands.per_image * groups, 1, [&](int64_t begin, int64_t end) {
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
    return forward_of(p, steps, static_cast<const T*>(input), static_cast<const T*>(weight),
                      static_cast<const T*>(bias), static_cast<T*>(y), code, scratch);
  });
}

}  // namespace dlfast::DLFAST_LEVEL
