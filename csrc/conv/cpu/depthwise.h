// Depthwise convolution: one kernel per channel. Forward and grad_input are the same gather.
//
// Channels lie in the vector lanes, a few pixels of a row in accumulators, so that a register of weights
// serves them all. Nothing is padded: every row takes the taps that meet the source, columns whose taps all
// do go in strips, those at the border one by one. float32 pixels of channels are read and written where they
// lie; any other dtype or layout goes through a band of workspace.
#pragma once

#include "conv/cpu/copy.h"
#include "conv/cpu/kernels.h"
#include "core/level.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

// Which positions of the source the outputs first_out + j * out_step of an axis read: tap t of them, kernel
// position first_tap + t * tap_step, reads from + j * step + t * reach. reach > 0.
struct Lattice {
  int64_t first_out, out_step;
  int64_t taps, first_tap, tap_step;
  int64_t from, step, reach;

  // The taps [begin, end) that meet a source of `size`.
  DLFAST_INLINE Span meeting(int64_t j, int64_t size) const {
    const int64_t at = from + j * step;
    const int64_t begin = at >= 0 ? 0 : std::min(taps, (-at + reach - 1) / reach);
    const int64_t end = at >= size ? 0 : std::min(taps, (size - 1 - at) / reach + 1);
    return {at, begin, std::max(begin, end)};
  }
  // The outputs [begin, end) of `count` that all taps of are within a source of `size`.
  Span inside(int64_t count, int64_t size) const {
    const int64_t room = size - 1 - (taps - 1) * reach - from;
    const int64_t begin = from >= 0 ? 0 : std::min(count, (-from + step - 1) / step);
    const int64_t end = room < 0 ? 0 : std::min(count, room / step + 1);
    return {0, begin, std::max(begin, end)};
  }
};

inline Lattice forward_lattice(const ConvParams& conv, int axis) {
  return {.first_out = 0,
          .out_step = 1,
          .taps = conv.kernel[axis],
          .first_tap = 0,
          .tap_step = 1,
          .from = -conv.padding[axis],
          .step = conv.stride[axis],
          .reach = conv.dilation[axis]};
}

// Input `position` got (position + padding - tap * dilation) / stride of the gradient by the taps where that
// is whole: every few of them, the same ones for positions a stride apart. In the order of the source.
inline Lattice gradient_lattice(const ConvParams& conv, int axis, int64_t position) {
  const int64_t stride = conv.stride[axis], dilation = conv.dilation[axis], kernel = conv.kernel[axis];
  const int64_t every = stride / std::gcd(stride, dilation);
  int64_t tap = 0;
  while (tap < std::min(kernel, every) && (position + conv.padding[axis] - tap * dilation) % stride != 0)
    ++tap;
  const int64_t taps = tap < std::min(kernel, every) ? (kernel - 1 - tap) / every + 1 : 0;
  const int64_t last = tap + (taps - 1) * every;
  return {.first_out = position,
          .out_step = stride,
          .taps = taps,
          .first_tap = last,
          .tap_step = -every,
          .from = taps == 0 ? 0 : (position + conv.padding[axis] - last * dilation) / stride,
          .step = 1,
          .reach = dilation * every / stride};
}

// ---- Rows of any tensor as pixels of float channels ----------------------------------------------------

// Pixels of fewer channels than a register has lanes are widened by zeros.
inline int64_t depthwise_width(int64_t channels) {
  return std::max<int64_t>(channels, kLanes);
}

// A tensor [N, C, rows, cols] to read from.
template <typename T>
struct DepthwiseSource {
  const T* data;
  int64_t channels, rows, cols;
  int64_t strides[4];

  bool in_place() const { return std::is_same_v<T, float> && strides[1] == 1 && channels >= kLanes; }
  int64_t width() const { return depthwise_width(channels); }

  // Rows [first, last) of an image as [row][col][width()], in `workspace` if they do not lie so already.
  struct View {
    const float* data;
    int64_t row_step, col_step;
  };
  View view(int64_t image, int64_t first, int64_t last, float* workspace) const {
    const T* from = data + image * strides[0] + first * strides[2];
    if constexpr (std::is_same_v<T, float>) {
      if (in_place()) return {from, strides[2], strides[3]};
    }
    const int64_t row_step = cols * width();
    if (channels < width()) std::fill_n(workspace, (last - first) * row_step, 0.0f);
    for (int64_t r = 0; r < last - first; ++r) {
      const T* row = from + r * strides[2];
      float* to = workspace + r * row_step;
      if (strides[1] != 1) {
        transpose_rows(row, strides[1], strides[3], channels, cols, to, width());
      } else {
        for (int64_t x = 0; x < cols; ++x) convert(row + x * strides[3], channels, to + x * width());
      }
    }
    return {workspace, row_step, width()};
  }
};

// A dense tensor [N, C, rows, cols] to write to.
template <typename T>
struct DepthwiseTarget {
  T* data;
  int64_t channels, rows, cols;
  bool channels_last;

  bool in_place() const { return std::is_same_v<T, float> && channels_last && channels >= kLanes; }
  float* row(int64_t image, int64_t at, float* workspace) const {
    if constexpr (std::is_same_v<T, float>) {
      if (in_place()) return data + (image * rows + at) * cols * channels;
    }
    return workspace;
  }
  // Writes what row() gave workspace for.
  void flush_row(int64_t image, int64_t at, const float* workspace) const {
    const int64_t width = depthwise_width(channels);
    if (channels_last) {
      T* to = data + (image * rows + at) * cols * channels;
      for (int64_t x = 0; x < cols; ++x) convert(workspace + x * width, channels, to + x * channels);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      T* to = data + ((image * channels + c) * rows + at) * cols;
      for (int64_t x = 0; x < cols; ++x) to[x] = static_cast<T>(workspace[x * width + c]);
    }
  }
};

// What the next row will read, in memory order: fetched while this one is computed, a share per pixel. The
// strips themselves read too many places at once for the processor to see where they go.
struct Ahead {
  const float* at = nullptr;
  const float* end = nullptr;
  int64_t per_pixel = 0;

  Ahead() = default;
  Ahead(const float* begin, int64_t floats, int64_t pixels)
      : at(begin), end(begin + floats), per_pixel((floats / pixels / kLine + 1) * kLine) {}
  DLFAST_INLINE void fetch(int64_t pixels) {
    const int64_t share = std::min<int64_t>(pixels * per_pixel, end - at);
    for (int64_t i = 0; i < share; i += kLine)
      __builtin_prefetch(at + i, 0, 2);  // into the second-level cache
    at += share;
  }

  static constexpr int64_t kLine = 16;  // floats of a cache line
};

// ---- The kernel ----------------------------------------------------------------------------------------

// The taps that some pixels of a row have, as steps in floats from the first of them.
struct DepthwiseTaps {
  int64_t rows, cols;
  int64_t source_row, source_col;
  int64_t weight_row, weight_col;
  int64_t source_pixel, out_pixel;  // between neighbouring outputs
};

// `bias` may be null.
template <int PIXELS, int VECTORS>
DLFAST_INLINE void depthwise_pixels(const DepthwiseTaps& t, const float* source, const float* weight,
                                    const float* bias, bool activate, float* out) {
  F acc[PIXELS][VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    const F start = bias == nullptr ? F{} : load<F>(bias + v * kLanes);
    for (int q = 0; q < PIXELS; ++q) acc[q][v] = start;
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* x = source + r * t.source_row;
    const float* w = weight + r * t.weight_row;
    for (int64_t s = 0; s < t.cols; ++s) {
      for (int v = 0; v < VECTORS; ++v) {
        const F of_tap = load<F>(w + v * kLanes);
        for (int q = 0; q < PIXELS; ++q) {
          acc[q][v] = load<F>(x + q * t.source_pixel + v * kLanes) * of_tap + acc[q][v];
        }
      }
      x += t.source_col;
      w += t.weight_col;
    }
  }
  for (int q = 0; q < PIXELS; ++q) {
    for (int v = 0; v < VECTORS; ++v) {
      store(out + q * t.out_pixel + v * kLanes, activate ? relu(acc[q][v]) : acc[q][v]);
    }
  }
}

template <int PIXELS, int VECTORS>
void depthwise_channels(const DepthwiseTaps& t, int64_t width, const float* source, const float* weight,
                        const float* bias, bool activate, float* out) {
  const auto biases = [&](int64_t c) { return bias == nullptr ? nullptr : bias + c; };
  int64_t c = 0;
  for (; c + VECTORS * kLanes <= width; c += VECTORS * kLanes) {
    depthwise_pixels<PIXELS, VECTORS>(t, source + c, weight + c, biases(c), activate, out + c);
  }
  for (; c < width; c += kLanes) {
    // The last register steps back over channels already done: the same numbers are written again.
    const int64_t at = std::min(c, width - kLanes);
    depthwise_pixels<PIXELS, 1>(t, source + at, weight + at, biases(at), activate, out + at);
  }
}

// Twelve accumulators hide the latency of a multiply-add, and leave registers for weights.
constexpr int kDepthwiseStrip = 6;

template <typename T>
struct Depthwise {
  const DepthwiseSource<T> source;
  const DepthwiseTarget<T> target;
  const ConvParams& conv;
  const bool gradient;  // the gather of grad_input
  const bool activate;
  int64_t band_rows, bands;              // of the target, in a unit of work
  int64_t source_floats, target_floats;  // of workspace, per thread

  Depthwise(const DepthwiseSource<T>& source_, const DepthwiseTarget<T>& target_, const ConvParams& conv_,
            bool gradient_, bool activate_, int64_t threads)
      : source(source_), target(target_), conv(conv_), gradient(gradient_), activate(activate_) {
    constexpr int64_t kUnitsPerThread = 4;
    const int64_t balanced = conv.batch * target.rows / (kUnitsPerThread * threads);
    // Rows that share few of their sources would rather be many in a band, if those are copied.
    const int64_t row_floats = source.cols * source.width();
    const int64_t cached = source.in_place() ? target.rows : 64 * 1024 / (row_floats * source_step());
    band_rows = std::clamp<int64_t>(std::min(balanced, cached), 1, target.rows);
    bands = (target.rows + band_rows - 1) / band_rows;
    source_floats = source.in_place() ? 0 : most_source_rows() * row_floats;
    target_floats = target.in_place() ? 0 : target.cols * source.width();
  }

  int64_t source_step() const { return gradient ? 1 : conv.stride[0]; }
  int64_t workspace_per_thread() const { return source_floats + target_floats; }

  Lattice row_lattice(int64_t row) const {
    return gradient ? gradient_lattice(conv, 0, row % conv.stride[0]) : forward_lattice(conv, 0);
  }
  int64_t row_index(int64_t row) const { return gradient ? row / conv.stride[0] : row; }

  // The rows of the source under rows [first, last) of the target.
  Span source_rows(int64_t first, int64_t last) const {
    const int64_t reach = (conv.kernel[0] - 1) * conv.dilation[0], stride = conv.stride[0];
    int64_t begin = first * stride - conv.padding[0];
    int64_t end = (last - 1) * stride - conv.padding[0] + reach + 1;
    if (gradient) {  // rounded outwards
      const int64_t low = first + conv.padding[0] - reach;
      begin = low < 0 ? 0 : low / stride;
      end = (last - 1 + conv.padding[0]) / stride + 1;
    }
    begin = std::clamp<int64_t>(begin, 0, source.rows);
    return {begin, begin, std::clamp<int64_t>(end, begin, source.rows)};
  }
  int64_t most_source_rows() const {
    int64_t most = 0;
    for (int64_t band = 0; band < bands; ++band) {
      const Span rows = source_rows(band * band_rows, std::min((band + 1) * band_rows, target.rows));
      most = std::max(most, rows.end - rows.begin);
    }
    return most;
  }

  void unit(int64_t index, const float* weight, const float* bias, float* workspace) const {
    const int64_t image = index / bands, first = index % bands * band_rows;
    const int64_t last = std::min(first + band_rows, target.rows);
    const Span rows = source_rows(first, last);
    const auto view = source.view(image, rows.begin, rows.end, workspace);
    for (int64_t y = first; y < last; ++y) {
      const Lattice down = row_lattice(y);
      const Span taps = down.meeting(row_index(y), source.rows);
      float* out = target.row(image, y, workspace + source_floats);
      DepthwiseTaps t{};
      t.rows = taps.end - taps.begin;
      const int64_t first_row = t.rows == 0 ? 0 : taps.origin + taps.begin * down.reach - rows.begin;
      const float* from = view.data + first_row * view.row_step;
      t.source_row = down.reach * view.row_step;
      t.weight_row = down.tap_step * conv.kernel[1] * source.width();
      const int64_t first_tap = t.rows == 0 ? 0 : down.first_tap + taps.begin * down.tap_step;
      const float* w = weight + first_tap * conv.kernel[1] * source.width();
      Ahead ahead;
      if (source.in_place() && y + 1 < last) {
        const int64_t known = source_rows(y, y + 1).end, next = source_rows(y + 1, y + 2).end;
        ahead = Ahead(view.data + (known - rows.begin) * view.row_step, (next - known) * view.row_step,
                      target.cols);
      }
      const int64_t residues = gradient ? std::min(conv.stride[1], target.cols) : 1;
      for (int64_t residue = 0; residue < residues; ++residue) {
        row(gradient ? gradient_lattice(conv, 1, residue) : forward_lattice(conv, 1), t, from, view.col_step,
            w, bias, ahead, out);
      }
      if (!target.in_place()) target.flush_row(image, y, out);
    }
  }

  // The outputs of one lattice of columns.
  void row(const Lattice& across, DepthwiseTaps t, const float* from, int64_t col_step, const float* weight,
           const float* bias, Ahead& ahead, float* out) const {
    const int64_t width = source.width();
    const int64_t count = (target.cols - across.first_out + across.out_step - 1) / across.out_step;
    t.source_col = across.reach * col_step;
    t.weight_col = across.tap_step * width;
    t.source_pixel = across.step * col_step;
    t.out_pixel = across.out_step * width;
    const Span inside = across.inside(count, source.cols);
    const auto strip = [&](auto pixels, auto vectors, int64_t j, const Span& taps) DLFAST_INLINE_LAMBDA {
      ahead.fetch(decltype(pixels)::value);
      t.cols = taps.end - taps.begin;
      const bool any = t.cols > 0 && t.rows > 0;
      depthwise_channels<decltype(pixels)::value, decltype(vectors)::value>(
          t, width, any ? from + (taps.origin + taps.begin * across.reach) * col_step : from,
          any ? weight + (across.first_tap + taps.begin * across.tap_step) * width : weight, bias, activate,
          out + (across.first_out + j * across.out_step) * width);
    };
    for (int64_t j = 0; j < count;) {
      const Span all{across.from + j * across.step, 0, across.taps};
      const int64_t left = j >= inside.begin ? inside.end - j : 0;
      if (left >= kDepthwiseStrip) {
        strip(std::integral_constant<int, kDepthwiseStrip>{}, std::integral_constant<int, 2>{}, j, all);
        j += kDepthwiseStrip;
      } else if (left >= 3) {
        strip(std::integral_constant<int, 3>{}, std::integral_constant<int, 4>{}, j, all);
        j += 3;
      } else {
        strip(std::integral_constant<int, 1>{}, std::integral_constant<int, 8>{}, j,
              across.meeting(j, source.cols));
        j += 1;
      }
    }
  }
};

// weight [C, 1, kh, kw] as [kh * kw][width], zeros beyond C.
template <typename T>
void pack_depthwise_weight(const ConvParams& conv, const WeightSteps& steps, const T* weight, float* packed) {
  const int64_t channels = conv.in_channels, width = depthwise_width(channels);
  if (channels < width) std::fill_n(packed, conv.positions() * width, 0.0f);
  for (int64_t r = 0; r < conv.kernel[0]; ++r) {
    for (int64_t s = 0; s < conv.kernel[1]; ++s) {
      const T* from = weight + r * steps.kernel[0] + s * steps.kernel[1];
      for (int64_t c = 0; c < channels; ++c) packed[c] = static_cast<float>(from[c * steps.out]);
      packed += width;
    }
  }
}

// Multiply-adds below which another thread does not pay.
constexpr int64_t kDepthwiseGrain = 65536;

template <typename T>
void depthwise_gather(const Depthwise<T>& d, const WeightSteps& steps, const T* weight, const T* bias,
                      float* workspace) {
  const int64_t width = d.source.width();
  float* packed = workspace;
  pack_depthwise_weight(d.conv, steps, weight, packed);
  float* own = packed + d.conv.positions() * width;
  float* biases = nullptr;
  if (bias != nullptr) {
    biases = own;
    std::fill_n(biases, width, 0.0f);
    convert(bias, d.target.channels, biases);
  }
  own += width;
  const int64_t work = d.band_rows * d.target.cols * width * d.conv.positions();
  at::parallel_for(0, d.conv.batch * d.bands, std::max<int64_t>(1, kDepthwiseGrain / work),
                   [&](int64_t begin, int64_t end) {
                     float* of_thread = own + at::get_thread_num() * d.workspace_per_thread();
                     for (int64_t index = begin; index < end; ++index)
                       d.unit(index, packed, biases, of_thread);
                   });
}

template <typename T>
Depthwise<T> depthwise_forward_of(const ConvBlockParams& p, const void* input, void* y, int64_t threads) {
  const auto [n, c, h, w] = p.input_strides;
  const ConvParams& conv = p.conv;
  return {
      {static_cast<const T*>(input), conv.in_channels, conv.input_size[0], conv.input_size[1], {n, c, h, w}},
      {static_cast<T*>(y), conv.in_channels, conv.output_size[0], conv.output_size[1], p.pool.channels_last},
      conv,
      false,
      p.pool.activation == Activation::relu,
      threads};
}

template <typename T>
Depthwise<T> depthwise_gradient_of(const ConvBlockParams& p, const void* grad_z, void* grad_input,
                                   int64_t threads) {
  const ConvParams& conv = p.conv;
  const int64_t channels = conv.in_channels, rows = conv.output_size[0], cols = conv.output_size[1];
  return {
      {static_cast<const T*>(grad_z),
       channels,
       rows,
       cols,
       {rows * cols * channels, 1, cols * channels, channels}},
      {static_cast<T*>(grad_input), channels, conv.input_size[0], conv.input_size[1], p.pool.channels_last},
      conv,
      true,
      false,
      threads};
}

int64_t depthwise_workspace(const ConvBlockParams& p, Dtype dtype, bool gradient, int64_t threads) {
  int64_t floats = (p.conv.positions() + 1) * depthwise_width(p.conv.in_channels);
  dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Depthwise<T> d = gradient ? depthwise_gradient_of<T>(p, nullptr, nullptr, threads)
                                    : depthwise_forward_of<T>(p, nullptr, nullptr, threads);
    floats += threads * d.workspace_per_thread();
    return true;
  });
  return floats;
}

void depthwise_forward(const ConvBlockParams& p, const WeightSteps& steps, Dtype dtype, const void* input,
                       const void* weight, const void* bias, void* y, float* workspace, int64_t threads) {
  dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    depthwise_gather(depthwise_forward_of<T>(p, input, y, threads), steps, static_cast<const T*>(weight),
                     static_cast<const T*>(bias), workspace);
    return true;
  });
}

void depthwise_grad_input(const ConvBlockParams& p, const WeightSteps& steps, Dtype dtype, const void* weight,
                          const void* grad_z, void* grad_input, float* workspace, int64_t threads) {
  dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    depthwise_gather(depthwise_gradient_of<T>(p, grad_z, grad_input, threads), steps,
                     static_cast<const T*>(weight), static_cast<const T*>(nullptr), workspace);
    return true;
  });
}

}  // namespace dlfast::DLFAST_LEVEL
