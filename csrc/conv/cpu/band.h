// Bands: the unit of work of the forward kernels. A band is a few pooled rows of one image; the input rows
// under it are copied once, zero-padded, into a thread's own [rows][columns][C] workspace, whatever the
// layout and the dtype of the input. Workspace per thread is bounded by the band, not by the image.
#pragma once

#include "conv/cpu/copy.h"
#include "conv/cpu/kernels.h"
#include "core/level.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

// Whether no lane of a sum of 0 * x is NaN: every x was finite.
DLFAST_INLINE bool all_zero(F doubt) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (doubt[lane] != 0.0f) return false;
  }
  return true;
}

// Parts of a thread's workspace start on cache lines, so that no register of them lies across two.
inline int64_t whole_lines(int64_t floats) {
  return round_up(floats, 16);
}

struct Bands {
  int64_t pooled_rows;           // in a band, the last one may have fewer
  int64_t per_image;             // bands
  int64_t conv_rows, conv_cols;  // under a band, that some window covers; whole tiles
  int64_t rows, cols;            // of the padded input under a band
  int64_t row_stride;            // of the padded input, in floats
  int64_t tile;                  // conv_rows and conv_cols are multiples of it

  explicit Bands(const ConvBlockParams& p) : tile(p.tile()) {
    const ReluPoolParams& pool = p.pool;
    pooled_rows = std::max<int64_t>(1, std::min(p.grain, pool.output_size[0]));
    per_image = (pool.output_size[0] + pooled_rows - 1) / pooled_rows;
    conv_rows = std::min((pooled_rows - 1) * pool.window.stride[0] + pool.window.size[0], pool.input_size[0]);
    const int64_t reach = (pool.output_size[1] - 1) * pool.window.stride[1] + pool.window.size[1];
    conv_cols = std::min(reach - pool.window.padding[1], pool.input_size[1]);
    conv_rows = round_up(conv_rows, tile);
    conv_cols = round_up(conv_cols, tile);
    rows = (conv_rows - 1) * p.conv.stride[0] + (p.conv.kernel[0] - 1) * p.conv.dilation[0] + 1;
    cols = (conv_cols - 1) * p.conv.stride[1] + (p.conv.kernel[1] - 1) * p.conv.dilation[1] + 1;
    row_stride = cols * p.conv.group_in();
  }
  int64_t input_floats() const { return rows * row_stride; }
  int64_t tiles() const { return conv_rows * conv_cols / (tile * tile); }
};

// One band of one image.
struct Band {
  int64_t image;
  int64_t first_pooled, pooled_rows;
  int64_t first_conv, conv_rows;  // clipped to the convolution output, but for whole tiles

  Band(const ConvBlockParams& p, const Bands& bands, int64_t index) {
    image = index / bands.per_image;
    first_pooled = index % bands.per_image * bands.pooled_rows;
    pooled_rows = std::min(bands.pooled_rows, p.pool.output_size[0] - first_pooled);
    first_conv = window_span(p.pool, 0, first_pooled).begin;
    conv_rows = round_up(window_span(p.pool, 0, first_pooled + pooled_rows - 1).end - first_conv, bands.tile);
  }
};

// Copies the input rows under `band`, the channels of one group, into packed [rows][cols][C], zeros where the
// convolution pads. `input` is the first channel of the group.
template <typename T>
void pack_input(const ConvBlockParams& p, const Bands& bands, const Band& band, const T* input,
                float* packed) {
  const int64_t channels = p.conv.group_in(), height = p.conv.input_size[0], width = p.conv.input_size[1];
  const auto [stride_n, stride_c, stride_h, stride_w] = p.input_strides;
  const int64_t rows =
      (band.conv_rows - 1) * p.conv.stride[0] + (p.conv.kernel[0] - 1) * p.conv.dilation[0] + 1;
  const int64_t top = band.first_conv * p.conv.stride[0] - p.conv.padding[0];
  const int64_t left = std::min(p.conv.padding[1], bands.cols);
  const int64_t inside = std::clamp<int64_t>(width, 0, bands.cols - left);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = packed + r * bands.row_stride;
    const int64_t y = top + r;
    if (y < 0 || y >= height) {
      std::memset(row, 0, bands.row_stride * sizeof(float));
      continue;
    }
    std::memset(row, 0, left * channels * sizeof(float));
    const T* from = input + band.image * stride_n + y * stride_h;
    float* to = row + left * channels;
    if (stride_c == 1 && stride_w == channels) {
      convert(from, inside * channels, to);
    } else if (channels == 1 && stride_w == 1) {
      convert(from, inside, to);
    } else {
      transpose_rows(from, stride_c, stride_w, channels, inside, to);
    }
    const int64_t right = bands.cols - left - inside;
    std::memset(to + inside * channels, 0, right * channels * sizeof(float));
  }
}

// The taps of a kernel over the packed input: `runs` runs of `length` numbers that lie together, in both the
// input and the packed weight. Without dilation a run is a whole kernel row of all channels.
struct Taps {
  int64_t rows, per_row, length;
  int64_t row_step, col_step;  // between runs, in floats of the packed input

  Taps(const ConvBlockParams& p, const Bands& bands) {
    const int64_t kw = p.conv.kernel[1], dilation = p.conv.dilation[1], channels = p.conv.group_in();
    const bool together = dilation == 1 || kw == 1;
    rows = p.conv.kernel[0];
    per_row = together ? 1 : kw;
    length = together ? kw * channels : channels;
    row_step = p.conv.dilation[0] * bands.row_stride;
    col_step = dilation * channels;
  }
};

}  // namespace dlfast::DLFAST_LEVEL
