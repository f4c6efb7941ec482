// What the CPU offers for convolution blocks: a table of kernels per SIMD level, chosen once.
//
// They compute without ever holding the convolution output or its gradient. They
// take float32, bfloat16 and float16, which they widen while packing, in any layout of the input.
#pragma once

#include <algorithm>

#include "conv/params.h"
#include "core/dtype.h"

namespace dlfast {

// Where the numbers of a weight [K, C / groups, kh, kw] lie, in elements; steps may be negative.
struct WeightSteps {
  int64_t out, in;    // between channels
  int64_t kernel[2];  // between rows and columns
  int64_t group;
};

// How grad_weight comes from a pooled gradient. The first two visit what passes gradient only.
enum class GradWeightKernel {
  channels,  // many input channels
  rows,      // few of them
  masked,    // few of them and a small kernel: every product, windows of four positions or none
};

struct ConvKernels {
  // weight as `steps` say, bias [K] or null, y and winner mask as in relu_pool.h (winner mask may be null).
  // workspace holds forward_workspace(p, dtype, threads) floats. False, and the result unusable, where
  // Winograd's sums are not finite, be it that the true ones are or not; never false for the direct kernel.
  bool (*forward)(const ConvBlockParams& p, const WeightSteps& steps, Dtype dtype, const void* input,
                  const void* weight, const void* bias, void* y, uint8_t* winner_mask, float* workspace);
  int64_t (*forward_workspace)(const ConvBlockParams& p, Dtype dtype, int64_t threads);

  // The gradients from a pooled gradient: only the positions that pass gradient are visited, but by
  // GradWeightKernel::masked. grad_y is channels_last; with max pooling winner mask is its uint8 winner mask,
  // channels_last too, without pooling what is zero in grad_y passes nothing and winner mask is null. False,
  // and the result unusable, where the input (for grad_weight, but masked) or the weight (for grad_input)
  // holds an infinity or a NaN: those meet the zeros that are skipped here, and PyTorch's product of the two
  // is NaN.

  // grad_weight like weight, grad_bias [K].
  bool (*grad_weight)(const ConvBlockParams& p, GradWeightKernel kernel, Dtype dtype, const void* input,
                      const void* grad_y, const uint8_t* winner_mask, void* grad_weight, void* grad_bias,
                      float* workspace);
  int64_t (*grad_weight_workspace)(const ConvBlockParams& p, GradWeightKernel kernel, int64_t threads);
  int64_t most_row_taps;  // kh * kw * C / groups that `rows` accepts

  // The same by Winograd's method where nothing was pooled, p.winograd being 4. Work is cut into bands. Of
  // the tiles of bands [first, last) `weight_sources` makes inputs [36, tiles, C] and gradients [36, tiles,
  // K], of one group; grad_y is channels_last. weight_from_sums takes sums [36, C, K] of their products over
  // all tiles; false, and the result unusable, where one is not finite.
  int64_t (*weight_bands)(const ConvBlockParams& p);
  int64_t (*weight_tiles)(const ConvBlockParams& p, int64_t first, int64_t last);
  void (*weight_sources)(const ConvBlockParams& p, Dtype dtype, int64_t group, int64_t first, int64_t last,
                         const void* input, const void* grad_y, float* inputs, float* gradients,
                         float* workspace);
  int64_t (*weight_sources_workspace)(const ConvBlockParams& p, int64_t threads);
  bool (*weight_from_sums)(const ConvBlockParams& p, Dtype dtype, const float* sums, void* grad_weight);

  // grad_input in the layout of the pool.
  bool (*grad_input)(const ConvBlockParams& p, Dtype dtype, const void* weight, const void* grad_y,
                     const uint8_t* winner_mask, void* grad_input, float* workspace);
  int64_t (*grad_input_workspace)(const ConvBlockParams& p, int64_t threads);

  // A depthwise convolution (depthwise_fits), ReLU or nothing after it. grad_z is channels_last and already
  // zero where ReLU passes nothing; every product is made, so that infinities and NaN need no other
  // algorithm. y and grad_input are in the layout of the pool; grad_bias may be null. The forward and
  // grad_input need depthwise_workspace floats for as many `threads` as they are told; grad_weight needs the
  // same for any number.
  void (*depthwise_forward)(const ConvBlockParams& p, const WeightSteps& steps, Dtype dtype,
                            const void* input, const void* weight, const void* bias, void* y,
                            float* workspace, int64_t threads);
  void (*depthwise_grad_input)(const ConvBlockParams& p, const WeightSteps& steps, Dtype dtype,
                               const void* weight, const void* grad_z, void* grad_input, float* workspace,
                               int64_t threads);
  void (*depthwise_grad_weight)(const ConvBlockParams& p, Dtype dtype, const void* input, const void* grad_z,
                                void* grad_weight, void* grad_bias, float* workspace);
  int64_t (*depthwise_workspace)(const ConvBlockParams& p, Dtype dtype, bool gradient, int64_t threads);
  int64_t (*depthwise_grad_weight_workspace)(const ConvBlockParams& p, Dtype dtype);

  // to [N, pixels, C] = from, or 0 where y <= 0; `from` and y are channels_last or contiguous, y may be null.
  void (*to_channels_last)(int64_t batch, int64_t channels, int64_t pixels, Dtype dtype, bool from_last,
                           const void* from, bool y_last, const void* y, void* to);
  void (*winner_mask_to_channels_last)(int64_t batch, int64_t channels, int64_t pixels, const uint8_t* from,
                                       uint8_t* to);

  int64_t lanes;  // floats in a register
};

const ConvKernels& conv_cpu();  // of the SIMD level in use

// Workspace per thread stays below 16 MiB (grad_weight adds a float per weight): what needs more, because a
// single band is that large, is left to PyTorch. All in floating point, since padding and dilation may be
// anything below 2^31.
constexpr double kMostWorkspaceFloats = 4.0 * 1024 * 1024;

// Winograd's tiles transformed at once, at least, where there are as many: the weights pass by once for all.
constexpr int64_t kWinogradTiles = 48;

// Transformed weights at once, in floats: a part of a last-level cache.
constexpr int64_t kWinogradWeights = 2 * 1024 * 1024;

// Pooled columns of a unit of grad_weight, at most: the input rows under a kernel stay in the first-level
// cache.
constexpr int64_t kGradWeightCols = 28;

// Positions of the padded input, along an axis, under `length` positions of the convolution output.
inline double padded_length(const ConvParams& conv, int axis, double length) {
  return (length - 1.0) * conv.stride[axis] + (conv.kernel[axis] - 1.0) * conv.dilation[axis] + 1.0;
}

// Whether a band of one pooled row fits, with `per_position` floats for each position of the convolution and
// so many `besides`.
inline bool smallest_band_fits(const ConvBlockParams& p, double per_position, double besides = 0.0) {
  const double conv_rows = std::min(p.pool.window.size[0], p.conv.output_size[0]) + p.tile() - 1.0;
  return padded_length(p.conv, 0, conv_rows) * padded_length(p.conv, 1, p.conv.output_size[1]) *
                 p.conv.in_channels +
             conv_rows * p.conv.output_size[1] * per_position + besides <=
         kMostWorkspaceFloats;
}

// What all kernels of blocks accept: winner_masks of a byte, and the dtypes that float32 holds.
inline bool block_fits(const ConvBlockParams& p, Dtype dtype) {
  return dtype != Dtype::float64 && !p.pool.wide_winner_mask();
}

// The bit mask of an average after ReLU is left to the pass after PyTorch's convolution.
inline bool forward_fits(const ConvBlockParams& p, Dtype dtype, bool save_winner_mask) {
  const bool mask_wanted =
      save_winner_mask && p.pool.pool == Pool::avg && p.pool.activation == Activation::relu;
  constexpr double kOutputsPerPosition = 64;  // a block of channels, and the tile it is pooled into
  const ConvParams& c = p.conv;
  const bool winograd_fits = c.kernel[0] == 3 && c.kernel[1] == 3 && c.stride[0] == 1 && c.stride[1] == 1 &&
                             c.dilation[0] == 1 && c.dilation[1] == 1;
  if (!block_fits(p, dtype) || mask_wanted) return false;
  if (p.winograd == 0) return smallest_band_fits(p, kOutputsPerPosition);
  // Half as many tiles again where that makes parts even.
  const double tiles = 36.0 * 1.5 * static_cast<double>(kWinogradTiles) * (c.group_in() + 64.0);
  return winograd_fits && smallest_band_fits(p, 5.0 * c.in_channels + 2.0 * c.out_channels, tiles);
}

// Whether every position of the convolution output lies in some window.
inline bool windows_cover(const ReluPoolParams& pool) {
  const auto cover = [&](int axis) {
    const int64_t end = (pool.output_size[axis] - 1) * pool.window.stride[axis] + pool.window.size[axis];
    return pool.window.stride[axis] <= pool.window.size[axis] &&
           end - pool.window.padding[axis] >= pool.input_size[axis];
  };
  return cover(0) && cover(1);
}

// Whether a window has four positions, all of them inside.
inline bool whole_windows_of_four(const ReluPoolParams& pool) {
  const PoolWindow& w = pool.window;
  const auto inside = [&](int axis) {
    return w.padding[axis] == 0 &&
           (pool.output_size[axis] - 1) * w.stride[axis] + w.size[axis] <= pool.input_size[axis];
  };
  return pool.window_positions() == 4 && inside(0) && inside(1);
}

inline bool grad_weight_fits(const ConvBlockParams& p, GradWeightKernel kernel, Dtype dtype,
                             const ConvKernels& kernels) {
  const int64_t taps = p.conv.positions() * p.conv.group_in();
  const bool accepted = kernel == GradWeightKernel::channels || taps <= kernels.most_row_taps;
  const bool windows =
      kernel != GradWeightKernel::masked || p.pool.pool == Pool::none || whole_windows_of_four(p.pool);
  return block_fits(p, dtype) && p.pool.pool != Pool::avg && accepted && windows &&
         smallest_band_fits(p, kernel == GradWeightKernel::masked ? 0.0 : 2.0 * p.conv.group_out());
}

// What grad_input takes for so many input rows, at most: lists for the convolution rows that reach them, and
// the rows.
inline double grad_input_floats(const ConvBlockParams& p, double rows) {
  constexpr double kMostListed = 128;
  const double conv_rows = (rows - 1 + (p.conv.kernel[0] - 1.0) * p.conv.dilation[0]) / p.conv.stride[0] + 1;
  const double covering = ((p.pool.window.size[0] - 1) / p.pool.window.stride[0] + 1.0) *
                          ((p.pool.window.size[1] - 1) / p.pool.window.stride[1] + 1.0);
  const double listed = std::min(kMostListed, static_cast<double>(p.conv.group_out())) * covering;
  return conv_rows * p.conv.output_size[1] * (2 * (listed + 1) + 4) +
         rows * padded_length(p.conv, 1, p.conv.output_size[1]) * (p.conv.in_channels + 16.0);
}

inline bool grad_input_fits(const ConvBlockParams& p, Dtype dtype) {
  const double rows = static_cast<double>(p.pool.window.stride[0]) * p.conv.stride[0];
  return block_fits(p, dtype) && p.pool.pool != Pool::avg &&
         grad_input_floats(p, rows) <= kMostWorkspaceFloats;
}

// One kernel per channel and no pooling. The smallest band, a row of outputs, and what lies under it must
// fit, and so must the weights.
inline bool depthwise_fits(const ConvBlockParams& p, Dtype dtype) {
  const ConvParams& c = p.conv;
  constexpr double kMostLanes = 16;  // to which fewer channels are widened
  const double width = std::max(static_cast<double>(c.in_channels), kMostLanes);
  const double rows = std::min((c.kernel[0] - 1.0) * c.dilation[0] + 1.0,
                               static_cast<double>(std::max(c.input_size[0], c.output_size[0])));
  const double row = width * std::max(c.input_size[1], c.output_size[1]);
  return dtype != Dtype::float64 && p.pool.pool == Pool::none && c.groups == c.in_channels &&
         c.out_channels == c.in_channels &&
         (rows + 1.0) * row + 2.0 * (c.positions() + 1.0) * width <= kMostWorkspaceFloats;
}

}  // namespace dlfast
