// grad_weight and grad_bias from the pooled gradient and the code, skipping what passes no gradient.
//
// A unit of work is a block of pooled rows and columns of one image and one group: its input is packed, and
// per output channel the positions that pass gradient are listed. Then some taps of the kernel lie in
// accumulators while the list streams by: one load of the input and one multiply-add per register of taps, no
// branch inside. What lies in a register is the packing's choice: the same tap of several input channels
// (cpu_grad_weight_channels.h), or, where there are few of them, several taps (cpu_grad_weight_patches.h).
#pragma once

namespace dlfast::DLFAST_LEVEL {

constexpr int kMostCols = 28;  // pooled, of a unit: the rows under a kernel stay in the first-level cache

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
    across = (pool.output_size[1] + kMostCols - 1) / kMostCols;
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
    ends = 2 * conv.group_out();
    lists = 2 * conv.group_out() * capacity;
    bias = conv.out_channels;
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

// The lists of a unit: that of channel k starts at lists + k * capacity and ends before ends[k]. Positions
// are given as Packing places them. Adds what the lists hold to the bias.
template <typename T>
void list_unit(const ConvBlockParams& p, const GradWeightSizes& sizes, const PooledGradient<T>& gradient,
               const Unit& unit, int64_t row_step, int64_t col_step, Live* lists, Live** ends, float* bias) {
  const int64_t outputs = p.conv.group_out(), first = unit.group * outputs;
  for (int64_t k = 0; k < outputs; ++k) ends[k] = lists + k * sizes.capacity;
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
    for (const Live* live = lists + k * sizes.capacity; live != ends[k]; ++live) sum += live->grad;
    bias[first + k] += sum;
  }
}

// Packing says how the input and the weight lie in the scratch of a slot: see ChannelPacking and
// PatchPacking. Every thread count gives its own fixed split into slots, summed in order: the same bits from
// run to run.
template <typename T, typename Packing>
bool grad_weight_with(const ConvBlockParams& p, const Packing& packing, const T* input, const T* grad_y,
                      const uint8_t* code, T* grad_weight, T* grad_bias, float* scratch) {
  const GradWeightSizes& sizes = packing.sizes;
  const PooledGradient<T> gradient(p, grad_y, code);
  const int64_t slots = at::get_num_threads();
  const int64_t units = p.conv.batch * sizes.down * sizes.across * p.conv.groups;
  const int64_t group_weight = packing.weight / p.conv.groups, per_slot = packing.per_slot();

  std::atomic<bool> finite{true};
  at::parallel_for(0, slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      Live** ends = reinterpret_cast<Live**>(scratch + slot * per_slot);
      Live* lists = reinterpret_cast<Live*>(scratch + slot * per_slot + sizes.ends);
      float* own_bias = scratch + slot * per_slot + sizes.ends + sizes.lists;
      float* own = own_bias + sizes.bias;
      float* packed = own + packing.weight;
      std::fill_n(own_bias, sizes.bias + packing.weight, 0.0f);
      for (int64_t index = units * slot / slots; index < units * (slot + 1) / slots; ++index) {
        const Unit unit(p, sizes, index);
        if (!packing.pack(unit, input, packed)) finite = false;
        list_unit(p, sizes, gradient, unit, packing.row_step, packing.col_step, lists, ends, own_bias);
        packing.accumulate(lists, ends, packed, own + unit.group * group_weight);
      }
    }
  });
  if (!finite) return false;

  const int64_t channels = p.conv.group_in(), taps = p.conv.positions(), outputs = p.conv.group_out();
  const float* first_bias = scratch + sizes.ends + sizes.lists;
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
