// grad_weight and grad_bias of a depthwise convolution.
//
// Channels lie in the vector lanes; the gradients of a few pixels of a row stay in registers while the taps
// pass by, each loading its sum, adding a product per pixel and storing it. The sums of a block of channels
// stay in the first-level cache over a band of rows. Bands, and the order in which they are summed, depend on
// the shape alone, so that the result has the same bits for every number of threads.
#pragma once

#include "conv/cpu/copy.h"
#include "conv/cpu/depthwise.h"
#include "conv/cpu/kernels.h"
#include "core/level.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

constexpr int64_t kDepthwiseSlots = 16;        // sums that are added up at the end
constexpr int64_t kDepthwiseSumFloats = 4096;  // of a block of channels, half a first-level cache

struct DepthwiseWeightSizes {
  int64_t width, sums;  // channels; taps and one for the bias
  int64_t rows, bands;  // of the gradient, in a unit of work
  int64_t units, slots;
  int64_t block;            // channels, whole registers
  int64_t input, gradient;  // floats of workspace, per slot
  int64_t input_rows;

  DepthwiseWeightSizes(const ConvParams& conv, bool input_in_place, bool gradient_in_place) {
    constexpr int64_t kLeastPixels = 16;  // of a unit: its sums are cleared and added
    const int64_t height = conv.output_size[0], cols = conv.output_size[1];
    width = depthwise_width(conv.in_channels);
    sums = conv.positions() + 1;
    const int64_t balanced = (conv.batch * height + kDepthwiseSlots - 1) / kDepthwiseSlots;
    rows = std::min(std::max(balanced, (kLeastPixels + cols - 1) / cols), height);
    if (!input_in_place) {
      rows = std::clamp<int64_t>(64 * 1024 / (conv.input_size[1] * width * conv.stride[0]), 1, rows);
    }
    bands = (height + rows - 1) / rows;
    units = conv.batch * bands;
    slots = std::min(units, kDepthwiseSlots);
    block =
        std::clamp<int64_t>(kDepthwiseSumFloats / sums / kLanes, 1, (width + kLanes - 1) / kLanes) * kLanes;
    const int64_t reach = (rows - 1) * conv.stride[0] + (conv.kernel[0] - 1) * conv.dilation[0] + 1;
    input_rows = std::min(reach, conv.input_size[0]);
    input = input_in_place ? 0 : input_rows * conv.input_size[1] * width;
    gradient = gradient_in_place ? 0 : rows * cols * width;
  }
  int64_t per_slot() const { return sums * width + sums * block + input + gradient; }
};

// The products of PIXELS pixels whose taps are the same, for one register of channels; sums [tap][block].
// Lanes where `keep` is set hold channels that another register has: their sums stay.
template <int PIXELS, bool LAST>
DLFAST_INLINE void depthwise_products(const DepthwiseTaps& t, const float* input, const float* grad,
                                      float* sums, decltype(F{} < F{}) keep) {
  F g[PIXELS];
  for (int q = 0; q < PIXELS; ++q) g[q] = load<F>(grad + q * t.out_pixel);
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* x = input + r * t.source_row;
    float* to = sums + r * t.weight_row;
    for (int64_t s = 0; s < t.cols; ++s) {
      const F before = load<F>(to);
      F sum = before;
      for (int q = 0; q < PIXELS; ++q) sum = load<F>(x + q * t.source_pixel) * g[q] + sum;
      if constexpr (LAST) sum = keep ? before : sum;
      store(to, sum);
      x += t.source_col;
      to += t.weight_col;
    }
  }
}

// The same for the channels [first, last) of a block, sums starting at the first of them.
template <int PIXELS>
void depthwise_products_of(const DepthwiseTaps& t, int64_t channels, const float* input, const float* grad,
                           float* sums) {
  using Mask = decltype(F{} < F{});
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    depthwise_products<PIXELS, false>(t, input + c, grad + c, sums + c, Mask{});
  }
  if (c == channels) return;
  const int64_t back = kLanes - (channels - c);
  Mask keep{};
  for (int lane = 0; lane < kLanes; ++lane) keep[lane] = lane < back ? -1 : 0;
  depthwise_products<PIXELS, true>(t, input + c - back, grad + c - back, sums + c - back, keep);
}

template <typename T>
struct DepthwiseWeight {
  const DepthwiseSource<T> input, gradient;
  const ConvParams& conv;
  const DepthwiseWeightSizes sizes;

  DepthwiseWeight(const DepthwiseSource<T>& input_, const DepthwiseSource<T>& gradient_,
                  const ConvParams& conv_)
      : input(input_),
        gradient(gradient_),
        conv(conv_),
        sizes(conv_, input_.in_place(), gradient_.in_place()) {}

  // Adds the sums of a unit to those of its slot, [tap][width].
  void unit(int64_t index, bool with_bias, float* slot) const {
    const int64_t image = index / sizes.bands, first = index % sizes.bands * sizes.rows;
    const int64_t last = std::min(first + sizes.rows, conv.output_size[0]);
    const int64_t reach = (conv.kernel[0] - 1) * conv.dilation[0];
    const int64_t top = std::clamp<int64_t>(first * conv.stride[0] - conv.padding[0], 0, input.rows);
    const int64_t bottom =
        std::clamp<int64_t>((last - 1) * conv.stride[0] - conv.padding[0] + reach + 1, top, input.rows);
    float* sums = slot + sizes.sums * sizes.width;
    float* packed = sums + sizes.sums * sizes.block;
    const auto x = input.view(image, top, bottom, packed);
    const auto g = gradient.view(image, first, last, packed + sizes.input);
    const Lattice down = forward_lattice(conv, 0);
    for (int64_t c = 0; c < sizes.width; c += sizes.block) {
      // The last block ends with the channels, and begins where a whole register still fits.
      const int64_t channels = std::min(sizes.block, sizes.width - c);
      const int64_t begin = std::min(c, sizes.width - kLanes), fresh = c - begin, used = channels + fresh;
      std::fill_n(sums, sizes.sums * sizes.block, 0.0f);
      for (int64_t y = first; y < last; ++y) {
        const Span taps = down.meeting(y, input.rows);
        const float* grad = g.data + (y - first) * g.row_step + begin;
        if (with_bias) add_bias(grad, g.col_step, used, sums + conv.positions() * sizes.block);
        if (taps.begin == taps.end) continue;
        DepthwiseTaps t{};
        t.rows = taps.end - taps.begin;
        t.source_row = conv.dilation[0] * x.row_step;
        t.weight_row = conv.kernel[1] * sizes.block;
        t.out_pixel = g.col_step;
        Ahead input_ahead, gradient_ahead;
        if (c == 0 && y + 1 < last) {  // later blocks find the rows in the second-level cache
          const int64_t known =
              std::clamp<int64_t>(y * conv.stride[0] - conv.padding[0] + reach + 1, top, bottom);
          const int64_t fresh_rows = std::min(conv.stride[0], bottom - known);
          if (input.in_place()) {
            input_ahead = Ahead(x.data + (known - top) * x.row_step, fresh_rows * x.row_step, gradient.cols);
          }
          gradient_ahead = Ahead(grad + g.row_step, g.row_step, gradient.cols);
        }
        row(t, x.data + (taps.origin + taps.begin * down.reach - top) * x.row_step + begin, x.col_step, grad,
            used, input_ahead, gradient_ahead, sums + taps.begin * t.weight_row);
      }
      for (int64_t tap = 0; tap < sizes.sums; ++tap) {
        float* to = slot + tap * sizes.width + begin;
        const float* from = sums + tap * sizes.block;
        for (int64_t i = fresh; i < used; ++i) to[i] += from[i];
      }
    }
  }

  void add_bias(const float* grad, int64_t col_step, int64_t channels, float* sums) const {
    for (int64_t x = 0; x < gradient.cols; ++x) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += grad[x * col_step + c];
    }
  }

  void row(DepthwiseTaps t, const float* from, int64_t col_step, const float* grad, int64_t channels,
           Ahead& input_ahead, Ahead& gradient_ahead, float* sums) const {
    const Lattice across = forward_lattice(conv, 1);
    t.source_col = across.reach * col_step;
    t.source_pixel = across.step * col_step;
    t.weight_col = sizes.block;
    const Span inside = across.inside(gradient.cols, input.cols);
    const auto strip = [&](auto pixels, int64_t j, const Span& taps) DLFAST_INLINE_LAMBDA {
      input_ahead.fetch(decltype(pixels)::value);
      gradient_ahead.fetch(decltype(pixels)::value);
      t.cols = taps.end - taps.begin;
      depthwise_products_of<decltype(pixels)::value>(
          t, channels, from + (taps.origin + taps.begin * across.reach) * col_step, grad + j * t.out_pixel,
          sums + taps.begin * t.weight_col);
    };
    for (int64_t j = 0; j < gradient.cols;) {
      const Span all{across.from + j * across.step, 0, across.taps};
      const int64_t left = j >= inside.begin ? inside.end - j : 0;
      if (left >= 8) {
        strip(std::integral_constant<int, 8>{}, j, all);
        j += 8;
      } else if (left >= 4) {
        strip(std::integral_constant<int, 4>{}, j, all);
        j += 4;
      } else if (left >= 2) {
        strip(std::integral_constant<int, 2>{}, j, all);
        j += 2;
      } else {
        const Span taps = across.meeting(j, input.cols);
        if (taps.end > taps.begin) strip(std::integral_constant<int, 1>{}, j, taps);
        j += 1;
      }
    }
  }
};

template <typename T>
DepthwiseWeight<T> depthwise_weight_of(const ConvBlockParams& p, const void* input, const void* grad_z) {
  const auto [n, c, h, w] = p.input_strides;
  const ConvParams& conv = p.conv;
  const int64_t channels = conv.in_channels, rows = conv.output_size[0], cols = conv.output_size[1];
  return {{static_cast<const T*>(input), channels, conv.input_size[0], conv.input_size[1], {n, c, h, w}},
          {static_cast<const T*>(grad_z),
           channels,
           rows,
           cols,
           {rows * cols * channels, 1, cols * channels, channels}},
          conv};
}

int64_t depthwise_grad_weight_workspace(const ConvBlockParams& p, Dtype dtype) {
  int64_t floats = 0;
  dispatch_block(dtype, [&](auto scalar) {
    const auto sizes = depthwise_weight_of<decltype(scalar)>(p, nullptr, nullptr).sizes;
    floats = sizes.slots * sizes.per_slot();
    return true;
  });
  return floats;
}

template <typename T>
void depthwise_grad_weight_of(const DepthwiseWeight<T>& d, T* grad_weight, T* grad_bias, float* workspace) {
  const DepthwiseWeightSizes& sizes = d.sizes;
  const int64_t taps = d.conv.positions(), per_slot = sizes.per_slot(), all = sizes.sums * sizes.width;
  const int64_t work = sizes.units / sizes.slots * sizes.rows * d.gradient.cols * sizes.width * taps;
  at::parallel_for(0, sizes.slots, std::max<int64_t>(1, kDepthwiseGrain / work),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t index = begin; index < end; ++index) {
                       float* slot = workspace + index * per_slot;
                       std::fill_n(slot, all, 0.0f);
                       const int64_t first = sizes.units * index / sizes.slots,
                                     last = sizes.units * (index + 1) / sizes.slots;
                       for (int64_t unit = first; unit < last; ++unit)
                         d.unit(unit, grad_bias != nullptr, slot);
                     }
                   });
  at::parallel_for(0, all, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t slot = 1; slot < sizes.slots; ++slot) {
      const float* from = workspace + slot * per_slot;
      for (int64_t i = begin; i < end; ++i) workspace[i] += from[i];
    }
  });
  for (int64_t c = 0; c < d.input.channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap)
      *grad_weight++ = static_cast<T>(workspace[tap * sizes.width + c]);
  }
  if (grad_bias != nullptr) convert(workspace + taps * sizes.width, d.input.channels, grad_bias);
}

void depthwise_grad_weight(const ConvBlockParams& p, Dtype dtype, const void* input, const void* grad_z,
                           void* grad_weight, void* grad_bias, float* workspace) {
  dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    depthwise_grad_weight_of(depthwise_weight_of<T>(p, input, grad_z), static_cast<T*>(grad_weight),
                             static_cast<T*>(grad_bias), workspace);
    return true;
  });
}

}  // namespace dlfast::DLFAST_LEVEL
