// grad_weight of a layer with few input channels: a register holds several taps of a kernel row, which lie
// together in the packed input.
#pragma once

#include "conv/cpu/direct_forward.h"
#include "conv/cpu/grad_weight.h"
#include "conv/cpu/grad_weight_channels.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/passing.h"
#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

constexpr int kMaxTaps = 400;  // beyond, a register is better used by input channels

// packed [rows][cols][C]; own [K][runs][width], a run being a kernel row of all channels, or with dilation
// one tap of all channels, and zeros or what lies behind it up to whole registers.
struct RowPacking {
  const ConvBlockParams& p;
  GradWeightSizes sizes;
  int64_t row_step, col_step;         // of a convolution position
  int64_t per_row, registers, width;  // runs in a kernel row; size of a run
  int64_t lists, weight, input;       // floats

  explicit RowPacking(const ConvBlockParams& params)
      : p(params), sizes(params), lists(UnitLists::floats(sizes)) {
    const ConvParams& conv = p.conv;
    row_step = conv.stride[0] * row();
    col_step = conv.stride[1] * conv.group_in();
    per_row = conv.dilation[1] == 1 ? 1 : conv.kernel[1];
    registers = (conv.kernel[1] / per_row * conv.group_in() + kLanes - 1) / kLanes;
    width = registers * kLanes;
    weight = conv.out_channels * conv.kernel[0] * per_row * width;
    input = packed_rows(p, sizes);
  }
  int64_t row() const { return sizes.cols * p.conv.group_in(); }
  int64_t place(int64_t k, int64_t c, int64_t tap) const {
    const int64_t channels = p.conv.group_in(), columns = p.conv.kernel[1];
    const int64_t run = per_row == 1 ? tap / columns : tap, col = per_row == 1 ? tap % columns : 0;
    return (k * p.conv.kernel[0] * per_row + run) * width + col * channels + c;
  }

  template <typename T>
  bool pack(const Unit& unit, const T* from, float* packed) const {
    return pack_rows(p, sizes, unit, from, packed);
  }

  // As many registers at a time as there are accumulators, of several rows where they are short.
  template <typename T>
  void accumulate(const PooledGradient<T>& gradient, const Unit& unit, const float* packed, float* workspace,
                  float* own, float* bias) const {
    constexpr int64_t kMostTogether = 5;  // registers of a run
    const ConvParams& conv = p.conv;
    const UnitLists live(sizes, workspace);
    live.fill(p, sizes, gradient, unit, row_step, col_step, bias);
    const int64_t down = conv.dilation[0] * row(), runs = conv.kernel[0] * per_row;
    const int64_t parts = (registers + kMostTogether - 1) / kMostTogether;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = registers * part / parts, count = registers * (part + 1) / parts - first;
      const int64_t rows = std::min(kMostStreamed / count, kMostRows);
      for (int64_t r = 0; r < conv.kernel[0]; r += rows) {
        const StreamChannels stream = stream_channels_of(std::min(rows, conv.kernel[0] - r), count);
        for (int64_t s = 0; s < per_row; ++s) {
          const float* at = packed + r * down + s * conv.dilation[1] * conv.group_in() + first * kLanes;
          for (int64_t k = 0; k < conv.group_out(); ++k) {
            float* to = own + (k * runs + r * per_row + s) * width + first * kLanes;
            stream(live.begin(k), live.end(k), at, down, to, per_row * width);
          }
        }
      }
    }
  }
};

}  // namespace dlfast::DLFAST_LEVEL
