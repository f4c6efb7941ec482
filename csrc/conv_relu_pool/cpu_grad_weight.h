// grad_weight and grad_bias of a layer with many input channels, from the pooled gradient and the code.
//
// Input channels lie in the vector lanes. A unit of work is a block of pooled rows and columns of one image and
// one group: its input is packed by registers of channels, and per output channel the positions that pass
// gradient are listed. Then, for a register of input channels, the taps of the kernel lie in accumulators while
// the list streams by: one load of the input and one multiply-add per tap, no branch inside.
#pragma once

namespace dlfast::DLFAST_LEVEL {

// The taps of a kernel in groups that fit the registers: `rows` kernel rows of `cols` taps side by side.
struct TapGroup {
  int64_t rows, cols;

  explicit TapGroup(const ConvParams& conv) {
    constexpr int64_t kMost = kLanes == 16 ? 24 : 12;
    const bool together = conv.dilation[1] == 1 && conv.kernel[1] <= 7 && conv.kernel[1] != 6;
    cols = together ? conv.kernel[1] : 1;
    rows = std::clamp<int64_t>(std::min<int64_t>(kMost / cols, 3), 1, conv.kernel[0]);
  }
};

// grad[r][s] += sum over the list of gradient * input[at + r * row + s * kLanes]; the rows of grad are
// `grad_row` apart.
template <int ROWS, int COLS>
void stream_list(const Live* list, int64_t count, const float* input, int64_t row, float* grad,
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
  int64_t i = 0;
  for (; i + FLIGHT <= count; i += FLIGHT) {
    for (int f = 0; f < FLIGHT; ++f) add(acc[f], list[i + f]);
  }
  for (; i < count; ++i) add(acc[0], list[i]);
  for (int r = 0; r < ROWS; ++r) {
    for (int s = 0; s < COLS; ++s) {
      F sum = acc[0][r][s];
      for (int f = 1; f < FLIGHT; ++f) sum += acc[f][r][s];
      float* to = grad + r * grad_row + s * kLanes;
      store(to, load<F>(to) + sum);
    }
  }
}

using StreamList = void (*)(const Live*, int64_t, const float*, int64_t, float*, int64_t);

template <int ROWS>
StreamList stream_list_of(int64_t cols) {
  constexpr int kMost = kLanes == 16 ? 24 : 12;
  if (cols == 1) return stream_list<ROWS, 1>;
  if (cols == 2) return stream_list<ROWS, 2>;
  if (cols == 3) return stream_list<ROWS, 3>;
  if (cols == 4) return stream_list<ROWS, 4>;
  if constexpr (ROWS * 5 <= kMost) {
    if (cols == 5) return stream_list<ROWS, 5>;
  }
  if constexpr (ROWS * 7 <= kMost) {
    if (cols == 7) return stream_list<ROWS, 7>;
  }
  return nullptr;  // TapGroup asks for no other
}

inline StreamList stream_list_of(int64_t rows, int64_t cols) {
  return rows == 1 ? stream_list_of<1>(cols) : rows == 2 ? stream_list_of<2>(cols) : stream_list_of<3>(cols);
}

struct GradWeightSizes {
  int64_t blocks;                    // of input channels
  int64_t pooled_rows, pooled_cols;  // of a unit
  int64_t down, across;              // units in an image
  int64_t rows, cols;                // of the input under a unit
  int64_t capacity;                  // of a list
  int64_t weight, bias, input, lists, counts;  // floats, per slot

  explicit GradWeightSizes(const ConvBlockParams& p) {
    const ConvParams& conv = p.conv;
    const ReluPoolParams& pool = p.pool;
    constexpr int64_t kMostCols = 28;  // so that the rows under a kernel stay in the first-level cache
    blocks = (conv.group_in() + kLanes - 1) / kLanes;
    pooled_rows = std::min(p.grain, pool.output_size[0]);
    down = (pool.output_size[0] + pooled_rows - 1) / pooled_rows;
    across = (pool.output_size[1] + kMostCols - 1) / kMostCols;
    pooled_cols = (pool.output_size[1] + across - 1) / across;
    across = (pool.output_size[1] + pooled_cols - 1) / pooled_cols;
    const auto reach = [&](int axis, int64_t pooled) {
      const int64_t of_conv = std::min((pooled - 1) * pool.window.stride[axis] + pool.window.size[axis],
                                       pool.input_size[axis]);
      return (of_conv - 1) * conv.stride[axis] + (conv.kernel[axis] - 1) * conv.dilation[axis] + 1;
    };
    rows = reach(0, pooled_rows);
    cols = reach(1, pooled_cols);
    capacity = pooled_rows * pooled_cols + 1;  // one beyond, written and not counted
    weight = conv.groups * blocks * conv.group_out() * conv.positions() * kLanes;
    bias = conv.out_channels;
    input = blocks * rows * cols * kLanes;
    lists = 2 * conv.group_out() * capacity;
    counts = conv.group_out();
  }
  int64_t per_slot() const { return weight + bias + input + lists + counts; }
};

int64_t grad_weight_scratch(const ConvBlockParams& p, int64_t threads) {
  return threads * GradWeightSizes(p).per_slot();
}

template <typename T>
struct GradWeight {
  const ConvBlockParams& p;
  const T* input;
  const PooledGradient<T> gradient;
  const GradWeightSizes sizes;

  struct Unit {
    int64_t image, group;
    int64_t first_row, last_row, first_col, last_col;  // pooled
    int64_t top, left;                                 // of the convolution
  };
  Unit unit_of(int64_t index) const {
    Unit u{};
    u.group = index % p.conv.groups;
    index /= p.conv.groups;
    u.first_col = index % sizes.across * sizes.pooled_cols;
    index /= sizes.across;
    u.first_row = index % sizes.down * sizes.pooled_rows;
    u.image = index / sizes.down;
    u.last_row = std::min(u.first_row + sizes.pooled_rows, p.pool.output_size[0]);
    u.last_col = std::min(u.first_col + sizes.pooled_cols, p.pool.output_size[1]);
    u.top = window_span(p.pool, 0, u.first_row).begin;
    u.left = window_span(p.pool, 1, u.first_col).begin;
    return u;
  }

  // The input under a unit as [block][rows][cols][kLanes], zeros where the convolution pads; false unless
  // all of it is finite.
  bool pack(const Unit& u, float* packed) const {
    const ConvParams& conv = p.conv;
    const auto [stride_n, stride_c, stride_h, stride_w] = p.input_strides;
    const int64_t top = u.top * conv.stride[0] - conv.padding[0];
    const int64_t left = u.left * conv.stride[1] - conv.padding[1];
    const int64_t channels = conv.group_in(), cols = sizes.cols;
    const int64_t begin = std::clamp<int64_t>(-left, 0, cols);
    const int64_t end = std::clamp<int64_t>(conv.input_size[1] - left, begin, cols);
    F doubt{};
    for (int64_t block = 0; block < sizes.blocks; ++block) {
      const int64_t c = block * kLanes, lanes = std::min<int64_t>(kLanes, channels - c);
      for (int64_t r = 0; r < sizes.rows; ++r) {
        float* to = packed + (block * sizes.rows + r) * cols * kLanes;
        const int64_t y = top + r;
        if (y < 0 || y >= conv.input_size[0] || lanes < kLanes) std::fill_n(to, cols * kLanes, 0.0f);
        if (y < 0 || y >= conv.input_size[0]) continue;
        const T* from = input + u.image * stride_n + (u.group * channels + c) * stride_c + y * stride_h +
                        (left + begin) * stride_w;
        std::fill_n(to, begin * kLanes, 0.0f);
        if (stride_c == 1 && lanes == kLanes) {
          for (int64_t x = begin; x < end; ++x) {
            store(to + x * kLanes, load_compute<kLanes>(from + (x - begin) * stride_w));
          }
        } else {
          transpose_rows(from, stride_c, stride_w, lanes, end - begin, to + begin * kLanes, kLanes);
        }
        std::fill(to + end * kLanes, to + cols * kLanes, 0.0f);
        for (int64_t x = begin; x < end; ++x) doubt += load<F>(to + x * kLanes) * 0.0f;
      }
    }
    return all_zero(doubt);
  }

  void list(const Unit& u, Live* lists, int32_t* counts, float* bias) const {
    const int64_t outputs = p.conv.group_out(), first = u.group * outputs;
    std::fill_n(counts, outputs, 0);
    for (int64_t py = u.first_row; py < u.last_row; ++py) {
      for (int64_t px = u.first_col; px < u.last_col; ++px) {
        gradient.visit(u.image, py, px, first, first + outputs,
                       [&](int64_t k, int64_t row, int64_t col, float grad, bool passes) DLFAST_INLINE_LAMBDA {
                         const int64_t at = (row - u.top) * p.conv.stride[0] * sizes.cols +
                                            (col - u.left) * p.conv.stride[1];
                         lists[k * sizes.capacity + counts[k]] = {grad, static_cast<int32_t>(at * kLanes)};
                         counts[k] += passes;
                       });
      }
    }
    for (int64_t k = 0; k < outputs; ++k) {
      float sum = 0.0f;
      for (int64_t i = 0; i < counts[k]; ++i) sum += lists[k * sizes.capacity + i].grad;
      bias[first + k] += sum;
    }
  }

  // own [block][K][kh * kw][kLanes] of the group += what the lists and the packed input give.
  void accumulate(const Live* lists, const int32_t* counts, const float* packed, float* own) const {
    const ConvParams& conv = p.conv;
    const TapGroup group(conv);
    const int64_t row = conv.dilation[0] * sizes.cols * kLanes, grad_row = conv.kernel[1] * kLanes;
    for (int64_t block = 0; block < sizes.blocks; ++block) {
      const float* from = packed + block * sizes.rows * sizes.cols * kLanes;
      for (int64_t r = 0; r < conv.kernel[0]; r += group.rows) {
        const StreamList stream = stream_list_of(std::min(group.rows, conv.kernel[0] - r), group.cols);
        for (int64_t s = 0; s < conv.kernel[1]; s += group.cols) {
          for (int64_t k = 0; k < conv.group_out(); ++k) {
            float* to = own + ((block * conv.group_out() + k) * conv.positions() + r * conv.kernel[1] + s) * kLanes;
            stream(lists + k * sizes.capacity, counts[k], from + r * row + s * conv.dilation[1] * kLanes, row,
                   to, grad_row);
          }
        }
      }
    }
  }
};

// Every thread count gives its own fixed split into slots, summed in order: the same bits from run to run.
template <typename T>
bool grad_weight_of(const ConvBlockParams& p, const T* input, const T* grad_y, const void* code,
                    T* grad_weight, T* grad_bias, float* scratch) {
  const ConvParams& conv = p.conv;
  const GradWeight<T> work{p, input, PooledGradient<T>(p, grad_y, code), GradWeightSizes(p)};
  const GradWeightSizes& sizes = work.sizes;
  const int64_t slots = at::get_num_threads(), outputs = conv.group_out(), channels = conv.group_in();
  const int64_t units = conv.batch * sizes.down * sizes.across * conv.groups;
  const int64_t group_weight = sizes.weight / conv.groups;

  std::atomic<bool> finite{true};
  at::parallel_for(0, slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      float* own = scratch + slot * sizes.per_slot();
      float* own_bias = own + sizes.weight;
      float* packed = own_bias + sizes.bias;
      Live* lists = reinterpret_cast<Live*>(packed + sizes.input);
      int32_t* counts = reinterpret_cast<int32_t*>(packed + sizes.input + sizes.lists);
      std::fill_n(own, sizes.weight + sizes.bias, 0.0f);
      for (int64_t index = units * slot / slots; index < units * (slot + 1) / slots; ++index) {
        const auto unit = work.unit_of(index);
        if (!work.pack(unit, packed)) finite = false;
        work.list(unit, lists, counts, own_bias);
        work.accumulate(lists, counts, packed, own + unit.group * group_weight);
      }
    }
  });
  if (!finite) return false;

  // The slots' [group][block][K][kh * kw][kLanes] to [K][C][kh * kw].
  const int64_t taps = conv.positions(), per_channel = taps * kLanes;
  at::parallel_for(0, conv.out_channels, std::max<int64_t>(1, kGrain / (channels * taps)), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t group = k / outputs;
      for (int64_t block = 0; block < sizes.blocks; ++block) {
        const float* from = scratch + group * group_weight + (block * outputs + k % outputs) * per_channel;
        const int64_t lanes = std::min<int64_t>(kLanes, channels - block * kLanes);
        for (int64_t t = 0; t < taps; ++t) {
          F sum{};
          for (int64_t slot = 0; slot < slots; ++slot) sum += load<F>(from + slot * sizes.per_slot() + t * kLanes);
          for (int64_t lane = 0; lane < lanes; ++lane) {
            grad_weight[(k * channels + block * kLanes + lane) * taps + t] = static_cast<T>(sum[lane]);
          }
        }
      }
      float sum = 0.0f;
      for (int64_t slot = 0; slot < slots; ++slot) sum += scratch[slot * sizes.per_slot() + sizes.weight + k];
      grad_bias[k] = static_cast<T>(sum);
    }
  });
  return true;
}

bool grad_weight(const ConvBlockParams& p, Dtype dtype, const void* input, const void* grad_y,
                 const void* code, void* grad_weight, void* grad_bias, float* scratch) {
  const auto run = [&](auto scalar) {
    using T = decltype(scalar);
    return grad_weight_of(p, static_cast<const T*>(input), static_cast<const T*>(grad_y), code,
                          static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), scratch);
  };
  if (dtype == Dtype::bfloat16) return run(c10::BFloat16{});
  if (dtype == Dtype::float16) return run(c10::Half{});
  return run(float{});
}

}  // namespace dlfast::DLFAST_LEVEL
