// grad_weight of a layer with many input channels: a register holds one tap of several channels.
#pragma once

#include "conv/cpu/band.h"
#include "conv/cpu/copy.h"
#include "conv/cpu/direct_forward.h"
#include "conv/cpu/grad_weight.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/passing.h"
#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

constexpr int kMostStreamed = kLanes == 16 ? 24 : 12;  // taps in registers at once

// grad[r][s] += sum over the list of gradient * input[at + r * row + s * kLanes]; the rows of grad are
// `grad_row` apart.
template <int ROWS, int COLS>
void stream_channels(const Live* list, const Live* end, const float* input, int64_t row, float* grad,
                     int64_t grad_row) {
  // Several positions in flight where few taps would wait for their multiply-adds.
  constexpr int FLIGHT = ROWS * COLS >= 6 ? 1 : ROWS * COLS >= 3 ? 2 : 4;
  F acc[FLIGHT][ROWS][COLS] = {};
  const auto add = [&](F(&to)[ROWS][COLS], const Live& live) DLFAST_INLINE_LAMBDA {
    const F g = broadcast<F>(live.grad);
    const float* x = input + live.at;
    for (int r = 0; r < ROWS; ++r) {
      for (int s = 0; s < COLS; ++s) to[r][s] = g * load<F>(x + r * row + s * kLanes) + to[r][s];
    }
  };
  for (; end - list >= FLIGHT; list += FLIGHT) {
    for (int f = 0; f < FLIGHT; ++f) add(acc[f], list[f]);
  }
  for (; list != end; ++list) add(acc[0], *list);
  for (int r = 0; r < ROWS; ++r) {
    for (int s = 0; s < COLS; ++s) {
      F sum = acc[0][r][s];
      for (int f = 1; f < FLIGHT; ++f) sum += acc[f][r][s];
      float* to = grad + r * grad_row + s * kLanes;
      store(to, load<F>(to) + sum);
    }
  }
}

using StreamChannels = void (*)(const Live*, const Live*, const float*, int64_t, float*, int64_t);

template <int ROWS>
StreamChannels stream_channels_of(int64_t cols) {
  if (cols == 1) return stream_channels<ROWS, 1>;
  if (cols == 2) return stream_channels<ROWS, 2>;
  if (cols == 3) return stream_channels<ROWS, 3>;
  if (cols == 4) return stream_channels<ROWS, 4>;
  if constexpr (ROWS * 5 <= kMostStreamed) {
    if (cols == 5) return stream_channels<ROWS, 5>;
  }
  if constexpr (ROWS * 7 <= kMostStreamed) {
    if (cols == 7) return stream_channels<ROWS, 7>;
  }
  return nullptr;  // nobody asks for another
}

// At most kMostRows.
inline StreamChannels stream_channels_of(int64_t rows, int64_t cols) {
  return rows == 1   ? stream_channels_of<1>(cols)
         : rows == 2 ? stream_channels_of<2>(cols)
                     : stream_channels_of<3>(cols);
}
constexpr int64_t kMostRows = 3;

// packed [block][rows][cols][kLanes]; own [block][K][kh * kw][kLanes].
struct ChannelPacking {
  const ConvBlockParams& p;
  GradWeightSizes sizes;
  int64_t blocks;                // of input channels
  int64_t row_step, col_step;    // of a convolution position in a block
  int64_t lists, weight, input;  // floats
  int64_t tap_rows, tap_cols;    // accumulated together

  explicit ChannelPacking(const ConvBlockParams& params)
      : p(params), sizes(params), lists(UnitLists::floats(sizes)) {
    const ConvParams& conv = p.conv;
    blocks = (conv.group_in() + kLanes - 1) / kLanes;
    row_step = conv.stride[0] * sizes.cols * kLanes;
    col_step = conv.stride[1] * kLanes;
    weight = conv.groups * blocks * conv.group_out() * conv.positions() * kLanes;
    input = blocks * sizes.rows * sizes.cols * kLanes;
    const bool together = conv.dilation[1] == 1 && conv.kernel[1] <= 7 && conv.kernel[1] != 6;
    tap_cols = together ? conv.kernel[1] : 1;
    tap_rows = std::min(std::min<int64_t>(kMostStreamed / tap_cols, kMostRows), conv.kernel[0]);
  }
  int64_t place(int64_t k, int64_t c, int64_t tap) const {
    return ((c / kLanes * p.conv.group_out() + k) * p.conv.positions() + tap) * kLanes + c % kLanes;
  }

  template <typename T>
  bool pack(const Unit& unit, const T* from, float* packed) const {
    const ConvParams& conv = p.conv;
    const auto [stride_n, stride_c, stride_h, stride_w] = p.input_strides;
    const int64_t channels = conv.group_in(), cols = sizes.cols;
    const int64_t begin = std::clamp<int64_t>(-unit.in_left, 0, cols);
    const int64_t end = std::clamp<int64_t>(conv.input_size[1] - unit.in_left, begin, cols);
    F doubt{};
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t c = block * kLanes, lanes = std::min<int64_t>(kLanes, channels - c);
      for (int64_t r = 0; r < sizes.rows; ++r) {
        float* to = packed + (block * sizes.rows + r) * cols * kLanes;
        const int64_t y = unit.in_top + r;
        const bool outside = y < 0 || y >= conv.input_size[0];
        if (outside || lanes < kLanes) std::fill_n(to, cols * kLanes, 0.0f);
        if (outside) continue;
        const T* row = from + unit.image * stride_n + (unit.group * channels + c) * stride_c + y * stride_h +
                       (unit.in_left + begin) * stride_w;
        std::fill_n(to, begin * kLanes, 0.0f);
        if (stride_c == 1 && lanes == kLanes) {
          for (int64_t x = begin; x < end; ++x) {
            store(to + x * kLanes, load_compute<kLanes>(row + (x - begin) * stride_w));
          }
        } else {
          transpose_rows(row, stride_c, stride_w, lanes, end - begin, to + begin * kLanes, kLanes);
        }
        std::fill(to + end * kLanes, to + cols * kLanes, 0.0f);
        for (int64_t x = begin; x < end; ++x) doubt += load<F>(to + x * kLanes) * 0.0f;
      }
    }
    return all_zero(doubt);
  }

  template <typename T>
  void accumulate(const PooledGradient<T>& gradient, const Unit& unit, const float* packed, float* workspace,
                  float* own, float* bias) const {
    const ConvParams& conv = p.conv;
    const UnitLists live(sizes, workspace);
    live.fill(p, sizes, gradient, unit, row_step, col_step, bias);
    const int64_t outputs = conv.group_out();
    const int64_t row = conv.dilation[0] * sizes.cols * kLanes, grad_row = conv.kernel[1] * kLanes;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* of_block = packed + block * sizes.rows * sizes.cols * kLanes;
      for (int64_t r = 0; r < conv.kernel[0]; r += tap_rows) {
        const StreamChannels stream = stream_channels_of(std::min(tap_rows, conv.kernel[0] - r), tap_cols);
        for (int64_t s = 0; s < conv.kernel[1]; s += tap_cols) {
          const float* at = of_block + r * row + s * conv.dilation[1] * kLanes;
          for (int64_t k = 0; k < outputs; ++k) {
            float* to = own + ((block * outputs + k) * conv.positions() + r * conv.kernel[1] + s) * kLanes;
            stream(live.begin(k), live.end(k), at, row, to, grad_row);
          }
        }
      }
    }
  }
};

}  // namespace dlfast::DLFAST_LEVEL
