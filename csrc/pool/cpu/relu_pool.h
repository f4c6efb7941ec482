// The pass after a convolution, on the CPU, for every dtype and layout.
//
// Both layouts are one: a channels_last tensor is [images = N, H, W, lanes = C], a contiguous one
// [images = N * C, H, W, lanes = 1].
#pragma once

#include "core/level.h"
#include "pool/cpu/planes.h"
#include "pool/cpu/window.h"
#include "pool/kernels.h"

namespace dlfast::DLFAST_LEVEL {

struct Layout {
  int64_t images, lanes;
  explicit Layout(const ReluPoolParams& p)
      : images(p.channels_last ? p.batch : p.batch * p.channels), lanes(p.channels_last ? p.channels : 1) {}
};

// Runs body(image, row) for every row of `rows` in every image, in parallel.
template <typename Body>
void for_each_row(const Layout& layout, int64_t rows, int64_t row_elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_elements));
  at::parallel_for(0, layout.images * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / rows, i % rows);
  });
}

// Runs body(std::integral_constant<int, N>, first lane) over `lanes` in whole vectors, then one by one.
template <typename Body>
DLFAST_INLINE void for_each_vector(int64_t lanes, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= lanes; c += kLanes) body(std::integral_constant<int, kLanes>{}, c);
  for (; c < lanes; ++c) body(std::integral_constant<int, 1>{}, c);
}

// `Affine` of N lanes: channels side by side, or one channel's plane.
template <typename T>
struct AffineLanes {
  const Affine<T>& affine;
  bool per_lane;
  int64_t channels;
  template <int N>
  DLFAST_INLINE Vec<Compute<T>, N> scale(int64_t image, int64_t c) const {
    using V = Vec<Compute<T>, N>;
    if (affine.scale == nullptr) return broadcast<V>(Compute<T>(1));
    return per_lane ? load<V>(affine.scale + c) : broadcast<V>(affine.scale[image % channels]);
  }
  template <int N>
  DLFAST_INLINE Vec<Compute<T>, N> shift(int64_t image, int64_t c) const {
    using V = Vec<Compute<T>, N>;
    if (!per_lane) return broadcast<V>(affine.shift_of(image % channels));
    if (affine.bias != nullptr) return load_compute<N>(affine.bias + c);
    return affine.shift == nullptr ? V{} : load<V>(affine.shift + c);
  }
};

template <typename T, typename WinnerMask>
void forward_max(const ReluPoolParams& p, const T* z, const Affine<T>& affine, T* y,
                 WinnerMask* winner_mask) {
  if (!p.channels_last) return forward_max_planes(p, z, affine, y, winner_mask);
  const Layout layout(p);
  const AffineLanes<T> lanes_of{affine, p.channels_last, p.channels};
  const int64_t width = p.input_size[1], pooled_width = p.output_size[1], lanes = layout.lanes;
  for_each_row(layout, p.output_size[0], pooled_width * lanes, [&](int64_t image, int64_t py) {
    const Span rows = window_span(p, 0, py);
    for (int64_t px = 0; px < pooled_width; ++px) {
      const Span cols = window_span(p, 1, px);
      const int64_t out = ((image * p.output_size[0] + py) * pooled_width + px) * lanes;
      for_each_vector(lanes, [&](auto n, int64_t c) {
        constexpr int N = decltype(n)::value;
        using V = Vec<Compute<T>, N>;
        const V a = lanes_of.template scale<N>(image, c), b = lanes_of.template shift<N>(image, c);
        Winner<V> winner;
        winner.start((rows.begin - rows.origin) * p.window.size[1] + cols.begin - cols.origin);
        for (int64_t h = rows.begin; h < rows.end; ++h) {
          for (int64_t w = cols.begin; w < cols.end; ++w) {
            const V v = load_compute<N>(z + ((image * p.input_size[0] + h) * width + w) * lanes + c) * a + b;
            winner.offer(v, (h - rows.origin) * p.window.size[1] + w - cols.origin);
          }
        }
        if (p.activation == Activation::relu) winner.apply_relu();
        store_compute<N>(y + out + c, winner.value);
        if (winner_mask != nullptr) store_winner_mask(winner_mask + out + c, winner.position);
      });
    }
  });
}

template <typename T>
void forward_avg(const ReluPoolParams& p, const T* z, const Affine<T>& affine, T* y) {
  const Layout layout(p);
  const AffineLanes<T> lanes_of{affine, p.channels_last, p.channels};
  const int64_t width = p.input_size[1], pooled_width = p.output_size[1], lanes = layout.lanes;
  for_each_row(layout, p.output_size[0], pooled_width * lanes, [&](int64_t image, int64_t py) {
    const Span rows = window_span(p, 0, py);
    for (int64_t px = 0; px < pooled_width; ++px) {
      const Span cols = window_span(p, 1, px);
      const auto divisor = static_cast<Compute<T>>(counted_length(p, 0, py) * counted_length(p, 1, px));
      const int64_t out = ((image * p.output_size[0] + py) * pooled_width + px) * lanes;
      for_each_vector(lanes, [&](auto n, int64_t c) {
        constexpr int N = decltype(n)::value;
        using V = Vec<Compute<T>, N>;
        const V a = lanes_of.template scale<N>(image, c), b = lanes_of.template shift<N>(image, c);
        V sum{};
        for (int64_t h = rows.begin; h < rows.end; ++h) {
          for (int64_t w = cols.begin; w < cols.end; ++w) {
            const V v = load_compute<N>(z + ((image * p.input_size[0] + h) * width + w) * lanes + c) * a + b;
            sum += p.activation == Activation::relu ? relu(v) : v;
          }
        }
        store_compute<N>(y + out + c, sum / divisor);
      });
    }
  });
}

// One bit per element of z in memory order: set where gradient passes the ReLU.
template <typename T>
void relu_mask(const ReluPoolParams& p, const T* z, const Affine<T>& affine, uint8_t* mask) {
  const int64_t numel = p.input_numel(), plane = p.input_size[0] * p.input_size[1];
  at::parallel_for(0, (numel + 7) / 8, kGrain / 8, [&](int64_t begin, int64_t end) {
    for (int64_t byte = begin; byte < end; ++byte) {
      unsigned bits = 0;
      const int64_t last = std::min<int64_t>(8, numel - byte * 8);
      for (int64_t j = 0; j < last; ++j) {
        const int64_t i = byte * 8 + j;
        const int64_t channel = p.channels_last ? i % p.channels : i / plane % p.channels;
        const auto v = static_cast<Compute<T>>(z[i]) * affine.scale_of(channel) + affine.shift_of(channel);
        bits |= static_cast<unsigned>(!(v <= 0)) << j;
      }
      mask[byte] = static_cast<uint8_t>(bits);
    }
  });
}

// y may be z.
template <typename T>
void forward_elementwise(const ReluPoolParams& p, const T* z, const Affine<T>& affine, T* y) {
  const Layout layout(p);
  const AffineLanes<T> lanes_of{affine, p.channels_last, p.channels};
  // What shares a bias or has one each: the channels of a pixel, or a row of a plane.
  const int64_t run = p.channels_last ? layout.lanes : p.input_size[1];
  const int64_t row = p.input_size[1] * layout.lanes;
  for_each_row(layout, p.input_size[0], row, [&](int64_t image, int64_t h) {
    const int64_t begin = (image * p.input_size[0] + h) * row;
    for (int64_t at = begin; at < begin + row; at += run) {
      for_each_vector(run, [&](auto n, int64_t c) {
        constexpr int N = decltype(n)::value;
        const auto a = lanes_of.template scale<N>(image, c), b = lanes_of.template shift<N>(image, c);
        const auto v = load_compute<N>(z + at + c) * a + b;
        store_compute<N>(y + at + c, p.activation == Activation::relu ? relu(v) : v);
      });
    }
  });
}

// grad_z of max pooling: an element takes the gradient of every window that it won.
template <typename T, typename WinnerMask>
void backward_max(const ReluPoolParams& p, const T* grad_y, const WinnerMask* winner_mask, T* grad_z) {
  if (!p.channels_last && (std::is_same_v<T, Compute<T>> || !windows_overlap(p))) {
    return backward_max_planes(p, grad_y, winner_mask, grad_z);
  }
  const Layout layout(p);
  const int64_t width = p.input_size[1], lanes = layout.lanes;
  for_each_row(layout, p.input_size[0], width * lanes, [&](int64_t image, int64_t h) {
    const Span rows = windows_over(p, 0, h);
    for (int64_t w = 0; w < width; ++w) {
      const Span cols = windows_over(p, 1, w);
      T* out = grad_z + ((image * p.input_size[0] + h) * width + w) * lanes;
      for_each_vector(lanes, [&](auto n, int64_t c) {
        constexpr int N = decltype(n)::value;
        using V = Vec<Compute<T>, N>;
        using Index = typename Winner<V>::Index;
        V sum{};
        for (int64_t py = rows.begin; py < rows.end; ++py) {
          const int64_t kh = h + p.window.padding[0] - py * p.window.stride[0];
          for (int64_t px = cols.begin; px < cols.end; ++px) {
            const int64_t kw = w + p.window.padding[1] - px * p.window.stride[1];
            const int64_t in = ((image * p.output_size[0] + py) * p.output_size[1] + px) * lanes + c;
            const auto at = static_cast<typename Winner<V>::Position>(kh * p.window.size[1] + kw);
            const Index won =
                convert_integers<Index>(load<Vec<WinnerMask, N>>(winner_mask + in)) == Index{} + at;
            sum += won ? load_compute<N>(grad_y + in) : V{};
          }
        }
        store_compute<N>(out + c, sum);
      });
    }
  });
}

DLFAST_INLINE bool mask_bit(const uint8_t* mask, int64_t i) {
  return (mask[i / 8] >> (i % 8)) & 1;
}

// grad_z of average pooling; mask is null where there was no ReLU.
template <typename T>
void backward_avg(const ReluPoolParams& p, const T* grad_y, const uint8_t* mask, T* grad_z) {
  const Layout layout(p);
  const int64_t width = p.input_size[1], lanes = layout.lanes;
  for_each_row(layout, p.input_size[0], width * lanes, [&](int64_t image, int64_t h) {
    const Span rows = windows_over(p, 0, h);
    for (int64_t w = 0; w < width; ++w) {
      const Span cols = windows_over(p, 1, w);
      const int64_t at = ((image * p.input_size[0] + h) * width + w) * lanes;
      for (int64_t c = 0; c < lanes; ++c) {
        Compute<T> sum = 0;
        for (int64_t py = rows.begin; py < rows.end; ++py) {
          for (int64_t px = cols.begin; px < cols.end; ++px) {
            const auto divisor = static_cast<Compute<T>>(counted_length(p, 0, py) * counted_length(p, 1, px));
            const int64_t in = ((image * p.output_size[0] + py) * p.output_size[1] + px) * lanes + c;
            sum += static_cast<Compute<T>>(grad_y[in]) / divisor;
          }
        }
        const bool passes = mask == nullptr || mask_bit(mask, at + c);
        grad_z[at + c] = static_cast<T>(passes ? sum : Compute<T>(0));
      }
    }
  });
}

template <typename T>
void mask_by_output(const ReluPoolParams& p, const T* grad, const T* y, T* out) {
  at::parallel_for(0, p.input_numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<Compute<T>>(y[i]) <= 0 ? T(0) : grad[i];
    }
  });
}

template <typename T, typename WinnerMask>
void transpose_pooled(const ReluPoolParams& p, const T* grad_z, const WinnerMask* winner_mask, T* grad_y) {
  const Layout layout(p);
  const int64_t width = p.input_size[1], lanes = layout.lanes;
  for_each_row(layout, p.output_size[0], p.output_size[1] * lanes, [&](int64_t image, int64_t py) {
    const Span rows = window_span(p, 0, py);
    for (int64_t px = 0; px < p.output_size[1]; ++px) {
      const Span cols = window_span(p, 1, px);
      const int64_t out = ((image * p.output_size[0] + py) * p.output_size[1] + px) * lanes;
      const auto divisor = static_cast<Compute<T>>(counted_length(p, 0, py) * counted_length(p, 1, px));
      for (int64_t c = 0; c < lanes; ++c) {
        const auto z_index = [&](int64_t h, int64_t w) {
          return ((image * p.input_size[0] + h) * width + w) * lanes + c;
        };
        if (p.pool == Pool::max) {
          const WinnerMask won = winner_mask[out + c];
          const int64_t h = rows.origin + won / p.window.size[1], w = cols.origin + won % p.window.size[1];
          const bool counts = won != kNoWinner<WinnerMask> && is_inside(p, h, w);
          grad_y[out + c] = counts ? grad_z[z_index(h, w)] : T(0);
          continue;
        }
        Compute<T> sum = 0;
        for (int64_t h = rows.begin; h < rows.end; ++h) {
          for (int64_t w = cols.begin; w < cols.end; ++w) {
            const int64_t i = z_index(h, w);
            if (winner_mask == nullptr || mask_bit(reinterpret_cast<const uint8_t*>(winner_mask), i)) {
              sum += static_cast<Compute<T>>(grad_z[i]);
            }
          }
        }
        grad_y[out + c] = static_cast<T>(sum / divisor);
      }
    }
  });
}

template <typename Body>
void dispatch_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float{});
    case Dtype::float64:
      return body(double{});
    case Dtype::bfloat16:
      return body(c10::BFloat16{});
    case Dtype::float16:
      return body(c10::Half{});
  }
}

// y and the winner mask from z; winner mask may be null where it is not wanted.
template <typename T>
void forward_any(const ReluPoolParams& p, const T* z, const Affine<T>& affine, T* y, void* winner_mask) {
  switch (p.pool) {
    case Pool::none:
      return forward_elementwise(p, z, affine, y);
    case Pool::avg:
      if (winner_mask != nullptr) relu_mask(p, z, affine, static_cast<uint8_t*>(winner_mask));
      return forward_avg(p, z, affine, y);
    case Pool::max:
      if (p.wide_winner_mask()) return forward_max(p, z, affine, y, static_cast<int32_t*>(winner_mask));
      return forward_max(p, z, affine, y, static_cast<uint8_t*>(winner_mask));
  }
}

void relu_pool_forward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* bias, void* y,
                       void* winner_mask, void*) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Affine<T> affine{.bias = static_cast<const T*>(bias)};
    forward_any(p, static_cast<const T*>(z), affine, static_cast<T*>(y), winner_mask);
  });
}

void relu_pool_backward(const ReluPoolParams& p, Dtype dtype, const void* grad_y_, const void* winner_mask,
                        void* grad_z_, void*) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const T* grad_y = static_cast<const T*>(grad_y_);
    T* grad_z = static_cast<T*>(grad_z_);
    switch (p.pool) {
      case Pool::none:
        return mask_by_output(p, grad_y, static_cast<const T*>(winner_mask), grad_z);
      case Pool::avg:
        return backward_avg(p, grad_y, static_cast<const uint8_t*>(winner_mask), grad_z);
      case Pool::max:
        if (p.wide_winner_mask())
          return backward_max(p, grad_y, static_cast<const int32_t*>(winner_mask), grad_z);
        return backward_max(p, grad_y, static_cast<const uint8_t*>(winner_mask), grad_z);
    }
  });
}

void relu_pool_transpose(const ReluPoolParams& p, Dtype dtype, const void* grad_z_, const void* winner_mask,
                         void* grad_y_, void*) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const T* grad_z = static_cast<const T*>(grad_z_);
    T* grad_y = static_cast<T*>(grad_y_);
    if (p.pool == Pool::none) return mask_by_output(p, grad_z, static_cast<const T*>(winner_mask), grad_y);
    if (p.pool == Pool::max && p.wide_winner_mask()) {
      return transpose_pooled(p, grad_z, static_cast<const int32_t*>(winner_mask), grad_y);
    }
    return transpose_pooled(p, grad_z, static_cast<const uint8_t*>(winner_mask), grad_y);
  });
}

}  // namespace dlfast::DLFAST_LEVEL
