// grad_input from the pooled gradient and the winner mask, skipping what passes no gradient.
//
// Per convolution pixel the output channels that pass gradient there are listed; then, for a register of
// input channels at a time, the taps lie in accumulators while the list streams by: one load of the weight
// and one multiply-add per tap, no branch inside. A unit of work is a few input rows of one image and one
// group; kernel rows that fall on a neighbour's rows are left to the neighbour, so that nothing is added
// twice or shared.
#pragma once

#include "conv/cpu/band.h"
#include "conv/cpu/copy.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/passing.h"
#include "core/level.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

constexpr int kMostTaps = kLanes == 16 ? 25 : 12;  // in registers at once

// tile[offsets[t]] += sum over the list of gradient * weight[t]
template <int TAPS>
DLFAST_INLINE void scatter_list(const Live* list, int64_t count, const float* weight, float* tile,
                                const int32_t* offsets) {
  F acc[TAPS];
  for (int t = 0; t < TAPS; ++t) acc[t] = load<F>(tile + offsets[t]);
  for (int64_t i = 0; i < count; ++i) {
    const F g = broadcast<F>(list[i].grad);
    const float* w = weight + list[i].at;
    for (int t = 0; t < TAPS; ++t) acc[t] = g * load<F>(w + t * kLanes) + acc[t];
  }
  for (int t = 0; t < TAPS; ++t) store(tile + offsets[t], acc[t]);
}

struct GradInputWorkspace {
  int64_t blocks;             // of input channels
  int64_t rows;               // of the input in a unit
  int64_t per_image;          // units
  int64_t cols;               // of a tile: all input columns that a tap can reach
  int64_t conv_rows;          // that reach a unit's rows
  int64_t chunk;              // output channels listed at once
  bool compact;               // the lists of a row follow each other
  int64_t capacity;           // of the list of a pixel, or of all lists of a row
  int64_t weight;             // floats, of one group
  int64_t tile, lists, ends;  // floats, per thread

  explicit GradInputWorkspace(const ConvBlockParams& p) {
    const ConvParams& conv = p.conv;
    const PoolWindow& window = p.pool.window;
    blocks = (conv.group_in() + kLanes - 1) / kLanes;
    rows = std::min(p.grain * window.stride[0] * conv.stride[0], conv.input_size[0]);
    per_image = (conv.input_size[0] + rows - 1) / rows;
    cols = (conv.output_size[1] - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1;
    conv_rows = std::min((rows - 1 + (conv.kernel[0] - 1) * conv.dilation[0]) / conv.stride[0] + 1,
                         conv.output_size[0]);
    // The weights of a chunk stay in the first-level cache while the pixels go by.
    constexpr int64_t kChunkFloats = 5 * 1024;
    chunk = std::clamp<int64_t>(kChunkFloats / (conv.positions() * kLanes), 16, 128);
    chunk = std::min(chunk, conv.group_out());
    const int64_t covering =
        ((window.size[0] - 1) / window.stride[0] + 1) * ((window.size[1] - 1) / window.stride[1] + 1);
    compact = p.pool.pool == Pool::max && covering == 1 && whole_windows_of_four(p.pool) &&
              std::endian::native == std::endian::little;  // for equal_bytes
    const int64_t pixels = compact ? p.pool.output_size[1] : covering;
    capacity = chunk * pixels + 1;  // one beyond, written and not counted
    weight = whole_lines(blocks * kLanes * conv.group_out() * conv.positions());
    tile = blocks * rows * cols * kLanes;
    lists = whole_lines(2 * conv_rows * (compact ? 1 : conv.output_size[1]) * capacity);
    ends = whole_lines(4 * conv_rows * conv.output_size[1]);
  }
  int64_t per_thread() const { return whole_lines(ends + lists + tile); }
};

int64_t grad_input_workspace(const ConvBlockParams& p, int64_t threads) {
  const GradInputWorkspace sizes(p);
  return p.conv.groups * sizes.weight + threads * sizes.per_thread();
}

// What passes gradient to every convolution pixel of a unit, row after row.
struct PixelLists {
  struct Bounds {
    const Live *begin, *end;
  };
  Bounds* of;
  Live* lists;

  // In the first numbers of a thread's workspace.
  PixelLists(const GradInputWorkspace& sizes, float* workspace)
      : of(reinterpret_cast<Bounds*>(workspace)), lists(reinterpret_cast<Live*>(workspace + sizes.ends)) {}
};

// The products, which do not depend on the dtype of the tensors.
struct Scatter {
  const ConvBlockParams& p;
  GradInputWorkspace sizes;

  explicit Scatter(const ConvBlockParams& params) : p(params), sizes(params) {}

  // The input rows [begin, end) of a unit and the convolution rows [first, last) that reach them.
  struct Rows {
    int64_t begin, end, first, last;
  };
  Rows rows_of(int64_t index) const {
    const ConvParams& conv = p.conv;
    const int64_t begin = index * sizes.rows, end = std::min(begin + sizes.rows, conv.input_size[0]);
    const int64_t above = begin + conv.padding[0] - (conv.kernel[0] - 1) * conv.dilation[0];
    const int64_t first = above <= 0 ? 0 : (above + conv.stride[0] - 1) / conv.stride[0];
    return {begin, end, first,
            std::min((end - 1 + conv.padding[0]) / conv.stride[0] + 1, conv.output_size[0])};
  }

  // TAPS taps of one convolution row, over all its pixels.
  template <int TAPS>
  void scatter_row(const PixelLists::Bounds* live, const float* weight, float* tile,
                   const int32_t* offsets) const {
    const int64_t step = p.conv.stride[1] * kLanes;
    for (int64_t x = 0; x < p.conv.output_size[1]; ++x) {
      const auto [begin, end] = live[x];
      if (begin != end) scatter_list<TAPS>(begin, end - begin, weight, tile + x * step, offsets);
    }
  }
  template <int TAPS = 1>
  void scatter_any(int64_t taps, const PixelLists::Bounds* live, const float* weight, float* tile,
                   const int32_t* offsets) const {
    if constexpr (TAPS <= kMostTaps) {
      if (taps == TAPS) return scatter_row<TAPS>(live, weight, tile, offsets);
      scatter_any<TAPS + 1>(taps, live, weight, tile, offsets);
    }
  }

  // weight is that of the unit's group, at the first output channel listed.
  void run(const Rows& rows, const PixelLists::Bounds* live, const float* weight, float* tile) const {
    const ConvParams& conv = p.conv;
    const int64_t width = conv.output_size[1];
    for (int64_t row = rows.first; row < rows.last; ++row) {
      // Kernel rows that fall into the unit's input rows.
      const int64_t top = row * conv.stride[0] - conv.padding[0], dilation = conv.dilation[0];
      const int64_t before = rows.begin - top, within = rows.end - 1 - top;
      const int64_t r0 = before <= 0 ? 0 : (before + dilation - 1) / dilation;
      const int64_t r1 = within < 0 ? 0 : std::min(within / dilation + 1, conv.kernel[0]);
      if (r0 >= r1) continue;
      const int64_t taps = (r1 - r0) * conv.kernel[1];
      const int64_t passes = (taps + kMostTaps - 1) / kMostTaps;
      const PixelLists::Bounds* of_row = live + (row - rows.first) * width;
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t begin = taps * pass / passes, end = taps * (pass + 1) / passes;
        int32_t offsets[kMostTaps];
        for (int64_t t = begin; t < end; ++t) {
          const int64_t r = r0 + t / conv.kernel[1], s = t % conv.kernel[1];
          offsets[t - begin] = static_cast<int32_t>(
              ((top + r * dilation - rows.begin) * sizes.cols + s * conv.dilation[1]) * kLanes);
        }
        scatter_any(end - begin, of_row, weight + (r0 * conv.kernel[1] + begin) * kLanes, tile, offsets);
      }
    }
  }
};

template <typename T>
struct GradInput {
  using Rows = Scatter::Rows;
  const ConvBlockParams& p;
  const PooledGradient<T> gradient;
  T* grad_input;
  const Scatter scatter;
  const GradInputWorkspace& sizes;

  GradInput(const ConvBlockParams& params, const T* grad_y, const uint8_t* winner_mask, T* grad_input_)
      : p(params),
        gradient(params, grad_y, winner_mask),
        grad_input(grad_input_),
        scatter(params),
        sizes(scatter.sizes) {}

  // weight [K, C, kh, kw] of a group as [block][K][kh * kw][kLanes], zeros beyond C; false unless finite.
  bool pack_weight(const T* weight, float* packed) const {
    const int64_t outputs = p.conv.group_out(), channels = p.conv.group_in(), taps = p.conv.positions();
    std::atomic<bool> finite{true};
    at::parallel_for(0, outputs, std::max<int64_t>(1, kGrain / (channels * taps)),
                     [&](int64_t begin, int64_t end) {
                       F doubt{};
                       for (int64_t k = begin; k < end; ++k) {
                         for (int64_t block = 0; block < sizes.blocks; ++block) {
                           float* to = packed + (block * outputs + k) * taps * kLanes;
                           const int64_t lanes = std::min<int64_t>(kLanes, channels - block * kLanes);
                           if (lanes < kLanes) std::fill_n(to, taps * kLanes, 0.0f);
                           const T* from = weight + (k * channels + block * kLanes) * taps;
                           for (int64_t lane = 0; lane < lanes; ++lane) {
                             for (int64_t t = 0; t < taps; ++t)
                               to[t * kLanes + lane] = static_cast<float>(*from++);
                           }
                           for (int64_t t = 0; t < taps; ++t) doubt += load<F>(to + t * kLanes) * 0.0f;
                         }
                       }
                       if (!all_zero(doubt)) finite = false;
                     });
    return finite;
  }

  // Lists of the output channels [k, k + count) for every convolution pixel of the rows.
  void list(int64_t image, const Rows& rows, int64_t k, int64_t count, const PixelLists& live) const {
    const int64_t width = p.conv.output_size[1];
    const auto begin = [&](int64_t i) { return live.lists + i * sizes.capacity; };
    for (int64_t i = 0; i < (rows.last - rows.first) * width; ++i) live.of[i] = {begin(i), begin(i)};
    if (rows.first >= rows.last) return;
    const Span pooled_rows = {0, windows_over(p.pool, 0, rows.first).begin,
                              windows_over(p.pool, 0, rows.last - 1).end};
    const Span pooled_cols = {0, 0, p.pool.output_size[1]};
    const Region region = {rows.first, rows.last, 0, width, width, 1};
    gradient.visit(image, pooled_rows, pooled_cols, k, k + count, region,
                   [&](int64_t i, int64_t at, float grad, bool passes) DLFAST_INLINE_LAMBDA {
                     const Live*& end = live.of[at].end;
                     begin(at)[end - begin(at)] = {grad, static_cast<int32_t>(i) * weight_step()};
                     end += passes;
                   });
  }
  int32_t weight_step() const { return static_cast<int32_t>(p.conv.positions() * kLanes); }

  // The same for windows of four positions that do not overlap: a window's channels are sorted by position
  // while their number stands in a register, and the lists of a row follow each other.
  void list_windows(int64_t image, const Rows& rows, int64_t k, int64_t count, const PixelLists& live) const {
    const PoolWindow& window = p.pool.window;
    const int64_t width = p.conv.output_size[1];
    for (int64_t row = rows.first; row < rows.last; ++row) {
      PixelLists::Bounds* of = live.of + (row - rows.first) * width;
      Live* end = live.lists + (row - rows.first) * sizes.capacity;
      for (int64_t x = 0; x < width; ++x) of[x] = {end, end};
      const Span over = windows_over(p.pool, 0, row);
      if (over.begin >= over.end) continue;
      const int64_t first = (row - over.begin * window.stride[0]) * window.size[1];  // position
      for (int64_t px = 0; px < p.pool.output_size[1]; ++px) {
        const int64_t at = gradient.pixel(image, over.begin, px) + k;
        for (int64_t kw = 0; kw < window.size[1]; ++kw) {
          PixelLists::Bounds& pixel = of[px * window.stride[1] + kw];
          pixel.begin = end;
          end = append(gradient.grad() + at, gradient.winner_mask() + at, static_cast<uint8_t>(first + kw),
                       count, end);
          pixel.end = end;
        }
      }
    }
  }

  // Of `count` channels those that won `position`, to `list`; its new end.
  Live* append(const T* grad, const uint8_t* winner_mask, uint8_t position, int64_t count, Live* list) const {
    const int32_t step = weight_step();
    for (int64_t first = 0; first < count; first += 64) {
      for (uint64_t left = equal_bytes(winner_mask + first, std::min<int64_t>(64, count - first), position);
           left != 0; left &= left - 1) {
        const int64_t i = first + std::countr_zero(left);
        *list++ = {static_cast<float>(grad[i]), static_cast<int32_t>(i) * step};
      }
    }
    return list;
  }

  // tile [block][rows][cols][kLanes] to the rows of grad_input.
  void flush_rows(int64_t image, int64_t group, const Rows& rows, const float* tile) const {
    const ConvParams& conv = p.conv;
    const int64_t height = conv.input_size[0], width = conv.input_size[1], channels = conv.group_in();
    const int64_t left = conv.padding[1];
    const int64_t reached = std::clamp<int64_t>(sizes.cols - left, 0, width);  // columns, the rest are zero
    const int64_t block_size = sizes.rows * sizes.cols * kLanes;
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const float* row = tile + ((y - rows.begin) * sizes.cols + left) * kLanes;
      if (p.pool.channels_last) {
        T* to = grad_input + ((image * height + y) * width) * conv.in_channels + group * channels;
        for (int64_t x = 0; x < width; ++x, to += conv.in_channels) {
          for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t lanes = std::min<int64_t>(kLanes, channels - c);
            if (x >= reached) {
              std::fill_n(to + c, lanes, T(0));
            } else if (lanes == kLanes) {
              store_compute<kLanes>(to + c, load<F>(row + c / kLanes * block_size + x * kLanes));
            } else {
              convert(row + c / kLanes * block_size + x * kLanes, lanes, to + c);
            }
          }
        }
        continue;
      }
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t lanes = std::min<int64_t>(kLanes, channels - c), plane = height * width;
        T* to = grad_input + (image * conv.in_channels + group * channels + c) * plane + y * width;
        transpose_matrix(row + c / kLanes * block_size, kLanes, reached, lanes, to, plane);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          std::fill(to + lane * plane + reached, to + lane * plane + width, T(0));
        }
      }
    }
  }

  void unit(int64_t index, const float* weights, float* workspace) const {
    const ConvParams& conv = p.conv;
    const int64_t group = index % conv.groups, outputs = conv.group_out();
    const int64_t image = index / conv.groups / sizes.per_image;
    const Rows rows = scatter.rows_of(index / conv.groups % sizes.per_image);
    const PixelLists live(sizes, workspace);
    float* tile = workspace + sizes.ends + sizes.lists;
    const int64_t block_size = sizes.rows * sizes.cols * kLanes,
                  block_weight = kLanes * outputs * conv.positions();
    std::fill_n(tile, sizes.tile, 0.0f);
    for (int64_t k = 0; k < outputs; k += sizes.chunk) {
      const int64_t first = group * outputs + k, count = std::min(sizes.chunk, outputs - k);
      if (sizes.compact) {
        list_windows(image, rows, first, count, live);
      } else {
        list(image, rows, first, count, live);
      }
      const float* weight = weights + group * sizes.weight + k * conv.positions() * kLanes;
      for (int64_t block = 0; block < sizes.blocks; ++block) {
        scatter.run(rows, live.of, weight + block * block_weight, tile + block * block_size);
      }
    }
    flush_rows(image, group, rows, tile);
  }
};

template <typename T>
bool grad_input_of(const ConvBlockParams& p, const T* weight, const T* grad_y, const uint8_t* winner_mask,
                   T* grad_input, float* workspace) {
  const GradInput<T> work(p, grad_y, winner_mask, grad_input);
  const GradInputWorkspace& sizes = work.sizes;
  bool finite = true;
  for (int64_t group = 0; group < p.conv.groups; ++group) {
    const int64_t numel = p.conv.group_out() * p.conv.group_in() * p.conv.positions();
    finite &= work.pack_weight(weight + group * numel, workspace + group * sizes.weight);
  }
  if (!finite) return false;
  float* own = workspace + p.conv.groups * sizes.weight;
  at::parallel_for(0, p.conv.batch * sizes.per_image * p.conv.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      work.unit(index, workspace, own + at::get_thread_num() * sizes.per_thread());
    }
  });
  return true;
}

bool grad_input(const ConvBlockParams& p, Dtype dtype, const void* weight, const void* grad_y,
                const uint8_t* winner_mask, void* grad_input, float* workspace) {
  return dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    return grad_input_of(p, static_cast<const T*>(weight), static_cast<const T*>(grad_y), winner_mask,
                         static_cast<T*>(grad_input), workspace);
  });
}

}  // namespace dlfast::DLFAST_LEVEL
