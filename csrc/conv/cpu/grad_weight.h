// grad_weight and grad_bias from the pooled gradient and the winner mask, skipping what passes no gradient.
//
// A unit of work is a block of pooled rows and columns of one image and one group. Its input is packed, then
// some taps of the kernel lie in accumulators while its gradient streams by, no branch inside. How is the
// packing's choice. Where there is much to multiply, the positions that pass gradient are listed first, per
// output channel, and a register holds one tap of several input channels (cpu_grad_weight_channels.h) or
// several taps of a kernel row (cpu_grad_weight_rows.h). Where there is little, lists would cost more than
// they save: a register holds several output channels (cpu_grad_weight_masked.h).
#pragma once

#include "conv/cpu/band.h"
#include "conv/cpu/copy.h"
#include "conv/cpu/direct_forward.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/passing.h"
#include "core/level.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

struct GradWeightSizes {
  int64_t pooled_rows, pooled_cols;  // of a unit
  int64_t down, across;              // units in an image
  int64_t conv_rows, conv_cols;      // under a unit
  int64_t rows, cols;                // of the input under a unit
  int64_t capacity;                  // of a list
  int64_t ends, lists, bias;         // floats, per slot

  explicit GradWeightSizes(const ConvBlockParams& p) {
    const ConvParams& conv = p.conv;
    const ReluPoolParams& pool = p.pool;
    pooled_rows = std::min(p.grain, pool.output_size[0]);
    down = (pool.output_size[0] + pooled_rows - 1) / pooled_rows;
    across = (pool.output_size[1] + kGradWeightCols - 1) / kGradWeightCols;
    pooled_cols = (pool.output_size[1] + across - 1) / across;
    across = (pool.output_size[1] + pooled_cols - 1) / pooled_cols;
    const auto under = [&](int axis, int64_t pooled) {
      return std::min((pooled - 1) * pool.window.stride[axis] + pool.window.size[axis],
                      pool.input_size[axis]);
    };
    const auto reach = [&](int axis, int64_t length) {
      return (length - 1) * conv.stride[axis] + (conv.kernel[axis] - 1) * conv.dilation[axis] + 1;
    };
    conv_rows = under(0, pooled_rows);
    conv_cols = under(1, pooled_cols);
    rows = reach(0, conv_rows);
    cols = reach(1, conv_cols);
    capacity = pooled_rows * pooled_cols + 1;  // one beyond, written and not counted
    ends = whole_lines(2 * conv.group_out());
    lists = whole_lines(2 * conv.group_out() * capacity);
    bias = whole_lines(conv.out_channels);
  }
};

struct Unit {
  int64_t image, group;
  Span pooled_rows, pooled_cols;
  int64_t top, left;        // first row and column of the convolution output
  int64_t in_top, in_left;  // of the input, may lie in the padding

  Unit(const ConvBlockParams& p, const GradWeightSizes& sizes, int64_t index) {
    group = index % p.conv.groups;
    index /= p.conv.groups;
    const int64_t col = index % sizes.across * sizes.pooled_cols;
    index /= sizes.across;
    const int64_t row = index % sizes.down * sizes.pooled_rows;
    image = index / sizes.down;
    pooled_rows = {0, row, std::min(row + sizes.pooled_rows, p.pool.output_size[0])};
    pooled_cols = {0, col, std::min(col + sizes.pooled_cols, p.pool.output_size[1])};
    top = window_span(p.pool, 0, row).begin;
    left = window_span(p.pool, 1, col).begin;
    in_top = top * p.conv.stride[0] - p.conv.padding[0];
    in_left = left * p.conv.stride[1] - p.conv.padding[1];
  }
};

// What passes gradient in a unit: the list of channel k starts at lists + k * capacity and ends before
// ends[k].
struct UnitLists {
  Live* lists;
  Live** ends;
  int64_t capacity;

  // In workspace of floats() numbers.
  UnitLists(const GradWeightSizes& sizes, float* workspace)
      : lists(reinterpret_cast<Live*>(workspace + sizes.ends)),
        ends(reinterpret_cast<Live**>(workspace)),
        capacity(sizes.capacity) {}
  static int64_t floats(const GradWeightSizes& sizes) { return sizes.ends + sizes.lists; }

  const Live* begin(int64_t k) const { return lists + k * capacity; }
  const Live* end(int64_t k) const { return ends[k]; }

  // Positions are given as the packing places them. Adds what the lists hold to the bias.
  template <typename T>
  void fill(const ConvBlockParams& p, const GradWeightSizes& sizes, const PooledGradient<T>& gradient,
            const Unit& unit, int64_t row_step, int64_t col_step, float* bias) const {
    const int64_t outputs = p.conv.group_out(), first = unit.group * outputs;
    for (int64_t k = 0; k < outputs; ++k) ends[k] = lists + k * capacity;
    const Region region = {unit.top,  std::min(unit.top + sizes.conv_rows, p.pool.input_size[0]),
                           unit.left, std::min(unit.left + sizes.conv_cols, p.pool.input_size[1]),
                           row_step,  col_step};
    gradient.visit(unit.image, unit.pooled_rows, unit.pooled_cols, first, first + outputs, region,
                   [&](int64_t k, int64_t at, float grad, bool passes) DLFAST_INLINE_LAMBDA {
                     Live*& end = ends[k];
                     *end = {grad, static_cast<int32_t>(at)};
                     end += passes;
                   });
    for (int64_t k = 0; k < outputs; ++k) {
      float sum = 0.0f;
      for (const Live* live = begin(k); live != end(k); ++live) sum += live->grad;
      bias[k] += sum;
    }
  }
};

// The input rows under a unit, few channels: packed [rows][cols][C] and a register, zeros in the padding.
// False unless all are finite.
template <typename T>
bool pack_rows(const ConvBlockParams& p, const GradWeightSizes& sizes, const Unit& unit, const T* from,
               float* packed) {
  const ConvParams& conv = p.conv;
  const auto [stride_n, stride_c, stride_h, stride_w] = p.input_strides;
  const int64_t channels = conv.group_in(), cols = sizes.cols;
  const int64_t begin = std::clamp<int64_t>(-unit.in_left, 0, cols);
  const int64_t end = std::clamp<int64_t>(conv.input_size[1] - unit.in_left, begin, cols);
  for (int64_t r = 0; r < sizes.rows; ++r) {
    float* to = packed + r * cols * channels;
    const int64_t y = unit.in_top + r;
    std::fill_n(to, cols * channels, 0.0f);
    if (y < 0 || y >= conv.input_size[0]) continue;
    const T* row = from + unit.image * stride_n + unit.group * channels * stride_c + y * stride_h +
                   (unit.in_left + begin) * stride_w;
    to += begin * channels;
    if (stride_w == channels && (stride_c == 1 || channels == 1)) {
      convert(row, (end - begin) * channels, to);
    } else {
      transpose_rows(row, stride_c, stride_w, channels, end - begin, to);
    }
  }
  const int64_t count = sizes.rows * cols * channels;
  std::fill_n(packed + count, kLanes, 0.0f);
  F doubt{};
  for (int64_t i = 0; i < count; i += kLanes) doubt += load<F>(packed + i) * 0.0f;
  return all_zero(doubt);
}

// Their size in floats.
inline int64_t packed_rows(const ConvBlockParams& p, const GradWeightSizes& sizes) {
  return whole_lines(sizes.rows * sizes.cols * p.conv.group_in() + kLanes);
}

template <typename Packing>
int64_t slot_floats(const Packing& packing) {
  return whole_lines(packing.lists + packing.sizes.bias + packing.weight + packing.input);
}

// Packing says how the input and the weight lie in the workspace of a slot: see ChannelPacking, RowPacking
// and MaskedPacking. Every thread count gives its own fixed split into slots, summed in order: the same bits
// from run to run.
template <typename T, typename Packing>
bool grad_weight_with(const ConvBlockParams& p, const Packing& packing, const T* input, const T* grad_y,
                      const uint8_t* winner_mask, T* grad_weight, T* grad_bias, float* workspace) {
  const GradWeightSizes& sizes = packing.sizes;
  const PooledGradient<T> gradient(p, grad_y, winner_mask);
  const int64_t slots = at::get_num_threads();
  const int64_t units = p.conv.batch * sizes.down * sizes.across * p.conv.groups;
  const int64_t group_weight = packing.weight / p.conv.groups, per_slot = slot_floats(packing);

  std::atomic<bool> finite{true};
  at::parallel_for(0, slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      float* lists = workspace + slot * per_slot;
      float* own_bias = lists + packing.lists;
      float* own = own_bias + sizes.bias;
      float* packed = own + packing.weight;
      std::fill_n(own_bias, sizes.bias + packing.weight, 0.0f);
      for (int64_t index = units * slot / slots; index < units * (slot + 1) / slots; ++index) {
        const Unit unit(p, sizes, index);
        if (!packing.pack(unit, input, packed)) finite = false;
        packing.accumulate(gradient, unit, packed, lists, own + unit.group * group_weight,
                           own_bias + unit.group * p.conv.group_out());
      }
    }
  });
  if (!finite) return false;

  const int64_t channels = p.conv.group_in(), taps = p.conv.positions(), outputs = p.conv.group_out();
  const float* first_bias = workspace + packing.lists;
  const float* first_own = first_bias + sizes.bias;
  const auto sum_slots = [&](const float* from) {
    float sum = 0.0f;
    for (int64_t slot = 0; slot < slots; ++slot) sum += from[slot * per_slot];
    return sum;
  };
  at::parallel_for(0, p.conv.out_channels, std::max<int64_t>(1, kGrain / (channels * taps)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t k = begin; k < end; ++k) {
                       const float* own = first_own + k / outputs * group_weight;
                       T* to = grad_weight + k * channels * taps;
                       for (int64_t c = 0; c < channels; ++c) {
                         for (int64_t t = 0; t < taps; ++t) {
                           *to++ = static_cast<T>(sum_slots(own + packing.place(k % outputs, c, t)));
                         }
                       }
                       grad_bias[k] = static_cast<T>(sum_slots(first_bias + k));
                     }
                   });
  return true;
}

}  // namespace dlfast::DLFAST_LEVEL
