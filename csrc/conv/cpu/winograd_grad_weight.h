// grad_weight of a 3x3 convolution with stride 1 where nothing was pooled, by Winograd's method backwards:
// with y = A'[(G g G') * (B'd B)]A of cpu_winograd.h, and sums over all tiles,
//     grad_g = G'[ sum (B'd B) * (A grad_y A') ]G
// so that 4x4 outputs cost 36 multiplications per pair of channels instead of 144. Per element of a
// transformed tile the sum is a matrix product over tiles, which op.cpp leaves to PyTorch; here is what goes
// into it and what comes out.
#pragma once

#include "conv/cpu/band.h"
#include "conv/cpu/copy.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/winograd.h"
#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

// The transposes of Winograd<4>::output and Winograd<4>::weight.
struct WinogradGradient {
  using W = Winograd<4>;
  static constexpr int kSide = W::kSide;
  template <typename V>
  static DLFAST_INLINE void output(const V (&d)[4], V (&t)[6]) {
    const V even_a = d[0] + W::a2 * d[2], odd_a = W::a * d[1] + W::a3 * d[3];
    const V even_b = d[0] + W::b2 * d[2], odd_b = W::b * d[1] + W::b3 * d[3];
    t[0] = d[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = d[3];
  }
  template <typename V>
  static DLFAST_INLINE void weight(const V (&u)[6], V (&g)[3]) {
    const V even_a = W::by_a * (u[1] + u[2]), even_b = W::by_b * (u[3] + u[4]);
    g[0] = W::by_0 * u[0] + even_a + even_b;
    g[1] = (W::by_a * W::a) * (u[1] - u[2]) + (W::by_b * W::b) * (u[3] - u[4]);
    g[2] = W::a2 * even_a + W::b2 * even_b + u[5];
  }
};

// The gradient under `band`, the channels of one group, as [conv_rows][conv_cols][K]; zeros in what rounding
// up to whole tiles added. `grad` is the first channel of the group in [N, OH, OW, all K].
template <typename T>
void pack_gradient(const ConvBlockParams& p, const Bands& bands, const Band& band, const T* grad,
                   float* packed) {
  const int64_t outputs = p.conv.group_out(), all = p.conv.out_channels;
  const int64_t height = p.conv.output_size[0], width = p.conv.output_size[1];
  const int64_t inside = std::min(width, bands.conv_cols);
  for (int64_t r = 0; r < band.conv_rows; ++r) {
    float* row = packed + r * bands.conv_cols * outputs;
    const int64_t y = band.first_conv + r;
    const int64_t present = y < height ? inside : 0;
    const T* from = grad + (band.image * height + y) * width * all;
    if (outputs == all) {
      convert(from, present * outputs, row);
    } else {
      for (int64_t x = 0; x < present; ++x) convert(from + x * all, outputs, row + x * outputs);
    }
    std::memset(row + present * outputs, 0, (bands.conv_cols - present) * outputs * sizeof(float));
  }
}

// All tiles of a packed gradient: to [36][plane / K][K], from tile `first` on.
void transform_gradient(const Bands& bands, int64_t outputs, int64_t tiles, const float* packed,
                        int64_t plane, float* to) {
  constexpr int kSide = WinogradGradient::kSide, M = 4;
  const int64_t per_row = bands.conv_cols / M, row_stride = bands.conv_cols * outputs;
  for (int64_t i = 0; i < tiles; ++i) {
    const float* from = packed + i / per_row * M * row_stride + i % per_row * M * outputs;
    const auto channels_at = [&](auto n, int64_t k) DLFAST_INLINE_LAMBDA {
      using V = Vec<float, decltype(n)::value>;
      V half[kSide][M];  // the columns transformed
      for (int x = 0; x < M; ++x) {
        V column[M], t[kSide];
        for (int y = 0; y < M; ++y) column[y] = load<V>(from + y * row_stride + x * outputs + k);
        WinogradGradient::output(column, t);
        for (int y = 0; y < kSide; ++y) half[y][x] = t[y];
      }
      for (int y = 0; y < kSide; ++y) {
        V t[kSide];
        WinogradGradient::output(half[y], t);
        for (int x = 0; x < kSide; ++x) store(to + (y * kSide + x) * plane + i * outputs + k, t[x]);
      }
    };
    int64_t k = 0;
    for (; k + kLanes <= outputs; k += kLanes) channels_at(std::integral_constant<int, kLanes>{}, k);
    for (; k < outputs; ++k) channels_at(std::integral_constant<int, 1>{}, k);
  }
}

// Tiles of bands [first, last) of a problem.
int64_t weight_tiles(const ConvBlockParams& p, int64_t first, int64_t last) {
  const Bands bands(p);
  const int64_t per_row = bands.conv_cols / p.tile();
  const auto before = [&](int64_t band) {
    const int64_t in_image = round_up(p.conv.output_size[0], p.tile()) / p.tile();
    const int64_t rows = std::min(band % bands.per_image * bands.conv_rows / p.tile(), in_image);
    return (band / bands.per_image * in_image + rows) * per_row;
  };
  return before(last) - before(first);
}

int64_t weight_bands(const ConvBlockParams& p) {
  return p.conv.batch * Bands(p).per_image;
}

int64_t weight_sources_workspace(const ConvBlockParams& p, int64_t threads) {
  const Bands bands(p);
  return threads * (whole_lines(bands.input_floats()) +
                    whole_lines(bands.conv_rows * bands.conv_cols * p.conv.group_out()));
}

template <typename T>
void weight_sources_of(const ConvBlockParams& p, int64_t group, int64_t first, int64_t last, const T* input,
                       const T* grad, float* inputs, float* gradients, float* workspace) {
  const Bands bands(p);
  const int64_t channels = p.conv.group_in(), outputs = p.conv.group_out();
  const int64_t count = weight_tiles(p, first, last);
  const int64_t per_thread = weight_sources_workspace(p, 1);
  at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
    float* packed = workspace + at::get_thread_num() * per_thread;
    float* packed_gradient = packed + whole_lines(bands.input_floats());
    for (int64_t index = begin; index < end; ++index) {
      const Band band(p, bands, index);
      const int64_t at = weight_tiles(p, first, index);
      const int64_t tiles = band.conv_rows * bands.conv_cols / (p.tile() * p.tile());
      pack_input(p, bands, band, input + group * channels * p.input_strides[1], packed);
      transform_input<4>(bands, channels, packed, 0, tiles, count * channels, inputs + at * channels);
      pack_gradient(p, bands, band, grad + group * outputs, packed_gradient);
      transform_gradient(bands, outputs, tiles, packed_gradient, count * outputs, gradients + at * outputs);
    }
  });
}

void weight_sources(const ConvBlockParams& p, Dtype dtype, int64_t group, int64_t first, int64_t last,
                    const void* input, const void* grad, float* inputs, float* gradients, float* workspace) {
  dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    weight_sources_of(p, group, first, last, static_cast<const T*>(input), static_cast<const T*>(grad),
                      inputs, gradients, workspace);
    return true;
  });
}

template <typename T>
bool weight_from_sums_of(const ConvBlockParams& p, const float* sums, T* grad_weight) {
  constexpr int kSide = WinogradGradient::kSide;
  const int64_t channels = p.conv.group_in(), outputs = p.conv.group_out(), plane = channels * outputs;
  std::atomic<bool> finite{true};
  at::parallel_for(0, outputs, 4, [&](int64_t begin, int64_t end) {
    float doubt = 0.0f;  // 0 * number: NaN once one is not finite
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t c = 0; c < channels; ++c) {
        const float* from = sums + c * outputs + k;
        float half[3][kSide];
        for (int x = 0; x < kSide; ++x) {
          float column[kSide], t[3];
          for (int y = 0; y < kSide; ++y) column[y] = from[(y * kSide + x) * plane];
          WinogradGradient::weight(column, t);
          for (int y = 0; y < 3; ++y) half[y][x] = t[y];
        }
        for (int y = 0; y < 3; ++y) {
          float t[3];
          WinogradGradient::weight(half[y], t);
          for (int x = 0; x < 3; ++x) {
            doubt += t[x] * 0.0f;
            grad_weight[(k * channels + c) * 9 + y * 3 + x] = static_cast<T>(t[x]);
          }
        }
      }
    }
    if (doubt != doubt) finite = false;
  });
  return finite;
}

bool weight_from_sums(const ConvBlockParams& p, Dtype dtype, const float* sums, void* grad_weight) {
  return dispatch_block(dtype, [&](auto scalar) {
    return weight_from_sums_of(p, sums, static_cast<decltype(scalar)*>(grad_weight));
  });
}

}  // namespace dlfast::DLFAST_LEVEL
