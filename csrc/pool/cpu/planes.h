// Max pooling of contiguous tensors [N, C, H, W], plane by plane: here the vector lanes are windows side by
// side in a row, since channels lie far apart.
#pragma once

#include "core/level.h"
#include "pool/cpu/window.h"
#include "pool/kernels.h"

namespace dlfast::DLFAST_LEVEL {

// What happens to z before the activation: z + bias, or z * scale + shift, each [C] or null. A product with 1
// is exact, so that one body serves all.
template <typename T>
struct Affine {
  const T* bias = nullptr;
  const Compute<T>* scale = nullptr;
  const Compute<T>* shift = nullptr;

  DLFAST_INLINE Compute<T> scale_of(int64_t channel) const {
    return scale == nullptr ? Compute<T>(1) : scale[channel];
  }
  DLFAST_INLINE Compute<T> shift_of(int64_t channel) const {
    if (bias != nullptr) return static_cast<Compute<T>>(bias[channel]);
    return shift == nullptr ? Compute<T>(0) : shift[channel];
  }
};

// N numbers `stride` apart.
template <int N, typename T>
DLFAST_INLINE Vec<Compute<T>, N> load_strided(const T* p, int64_t stride) {
  Compute<T> values[N];
  for (int i = 0; i < N; ++i) values[i] = static_cast<Compute<T>>(p[i * stride]);
  return load<Vec<Compute<T>, N>>(values);
}

template <typename T, typename WinnerMask>
struct PlaneForward {
  const ReluPoolParams& p;
  const T* z;  // the plane
  Compute<T> scale, shift;
  T* y;                     // the plane
  WinnerMask* winner_mask;  // the plane, or null

  // N windows from column px of pooled row py on; `cols` is the part of the first that lies inside, the
  // others lie inside whole if N > 1.
  template <int N>
  DLFAST_INLINE void windows(int64_t py, int64_t px, const Span& rows, const Span& cols) const {
    using V = Vec<Compute<T>, N>;
    Winner<V> winner;
    winner.start((rows.begin - rows.origin) * p.window.size[1] + cols.begin - cols.origin);
    for (int64_t h = rows.begin; h < rows.end; ++h) {
      for (int64_t w = cols.begin; w < cols.end; ++w) {
        const V v = load_strided<N>(z + h * p.input_size[1] + w, p.window.stride[1]) * scale + shift;
        winner.offer(v, (h - rows.origin) * p.window.size[1] + w - cols.origin);
      }
    }
    if (p.activation == Activation::relu) winner.apply_relu();
    const int64_t out = py * p.output_size[1] + px;
    store_compute<N>(y + out, winner.value);
    if (winner_mask != nullptr) store_winner_mask(winner_mask + out, winner.position);
  }
};

template <typename T, typename WinnerMask>
void forward_max_planes(const ReluPoolParams& p, const T* z, const Affine<T>& affine, T* y,
                        WinnerMask* winner_mask) {
  const int64_t plane = p.input_size[0] * p.input_size[1], pooled = p.output_size[0] * p.output_size[1];
  const int64_t pooled_width = p.output_size[1];
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, plane));
  at::parallel_for(0, p.batch * p.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const int64_t channel = image % p.channels;
      const PlaneForward<T, WinnerMask> forward{
          p,
          z + image * plane,
          affine.scale_of(channel),
          affine.shift_of(channel),
          y + image * pooled,
          winner_mask == nullptr ? nullptr : winner_mask + image * pooled};
      for (int64_t py = 0; py < p.output_size[0]; ++py) {
        const Span rows = window_span(p, 0, py);
        for (int64_t px = 0; px < pooled_width;) {
          // Whole groups; the last steps back over windows already done rather than doing the rest one by
          // one.
          const auto group = [&](auto n) DLFAST_INLINE_LAMBDA {
            constexpr int N = decltype(n)::value;
            const int64_t at = std::min(px, pooled_width - N);
            if (at < 0) return false;
            const Span cols = window_span(p, 1, at);
            const bool inside = cols.begin == cols.origin &&
                                window_span(p, 1, at + N - 1).origin + p.window.size[1] <= p.input_size[1];
            if (!inside) return false;
            forward.template windows<N>(py, at, rows, cols);
            px = at + N;
            return true;
          };
          if (group(std::integral_constant<int, kLanes>{}) || group(std::integral_constant<int, 4>{}))
            continue;
          forward.template windows<1>(py, px, rows, window_span(p, 1, px));
          ++px;
        }
      }
    }
  });
}

// grad_z of max pooling. One thread goes through a plane window by window, so that sums are added in one
// order; they are added in T, which is why 16-bit types come here only where windows do not overlap.
template <typename T, typename WinnerMask>
void backward_max_planes(const ReluPoolParams& p, const T* grad_y, const WinnerMask* winner_mask, T* grad_z) {
  const int64_t plane = p.input_size[0] * p.input_size[1], pooled = p.output_size[0] * p.output_size[1];
  const int64_t width = p.input_size[1];
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, plane));
  at::parallel_for(0, p.batch * p.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      T* to = grad_z + image * plane;
      std::fill_n(to, plane, T(0));
      for (int64_t py = 0; py < p.output_size[0]; ++py) {
        const int64_t top = window_span(p, 0, py).origin;
        for (int64_t px = 0; px < p.output_size[1]; ++px) {
          const int64_t in = image * pooled + py * p.output_size[1] + px;
          const WinnerMask won = winner_mask[in];
          if (won == kNoWinner<WinnerMask>) continue;
          const int64_t kh = static_cast<uint32_t>(won) / static_cast<uint32_t>(p.window.size[1]);
          const int64_t h = top + kh, w = window_span(p, 1, px).origin + won - kh * p.window.size[1];
          if (!is_inside(p, h, w)) continue;
          T& target = to[h * width + w];
          target = static_cast<T>(static_cast<Compute<T>>(target) + static_cast<Compute<T>>(grad_y[in]));
        }
      }
    }
  });
}

inline bool windows_overlap(const ReluPoolParams& p) {
  return p.window.stride[0] < p.window.size[0] || p.window.stride[1] < p.window.size[1];
}

}  // namespace dlfast::DLFAST_LEVEL
