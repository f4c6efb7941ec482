// Batch normalisation around the pass of pool/cpu/relu_pool.h, for every dtype and layout.
#pragma once

#include "core/level.h"
#include "norm/cpu/moments.h"
#include "norm/cpu/slices.h"
#include "norm/kernels.h"
#include "pool/cpu/planes.h"
#include "pool/cpu/relu_pool.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

void norm_forward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* scale, const void* shift,
                  void* y, void* winner_mask, void* /*stream*/) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Affine<T> affine{.bias = nullptr,
                           .scale = static_cast<const Compute<T>*>(scale),
                           .shift = static_cast<const Compute<T>*>(shift)};
    forward_any(p, static_cast<const T*>(z), affine, static_cast<T*>(y),
                p.pool == Pool::max ? winner_mask : nullptr);
  });
}

// ---- Backward -----------------------------------------------------------------------------------------

// The vectors [C] of a backward pass, as numbers of one plane or of a few channels.
template <typename T>
struct Norm {
  using C = Compute<T>;
  const C *scale, *shift, *mean, *by_z, *offset;
  bool masked;  // gradient passes where z * scale + shift is not 0 or less

  template <typename V>
  DLFAST_INLINE V passed(V g, V z, V a, V b) const {
    return masked ? (z * a + b <= V{} ? V{} : g) : g;
  }
};

// Sum of g and of g * (z - mean) over a whole tensor g like z.
template <typename T>
void reduce_dense(const ReluPoolParams& p, const T* z, const T* g, const Norm<T>& norm, double* partial) {
  using C = Compute<T>;
  const Slices slices(p);
  if (!p.channels_last) {
    slices.for_each_plane([&](int64_t i) {
      const int64_t c = i % p.channels, first = i * slices.plane;
      double sum = 0, moment = 0;
      for (int64_t begin = 0; begin < slices.plane; begin += kCachedRun) {
        const int64_t n = std::min(kCachedRun, slices.plane - begin);
        Vec<C, kLanes> s{}, m{};
        for_each_vector(n, [&](auto width, int64_t at) {
          constexpr int N = decltype(width)::value;
          using V = Vec<C, N>;
          const V x = load_compute<N>(z + first + begin + at);
          const V passed = norm.passed(load_compute<N>(g + first + begin + at), x,
                                       broadcast<V>(norm.scale[c]), broadcast<V>(norm.shift[c]));
          if constexpr (N == kLanes) {
            s += passed;
            m += passed * (x - norm.mean[c]);
          } else {
            sum += passed[0];
            moment += passed[0] * (x[0] - norm.mean[c]);
          }
        });
        sum += sum_lanes<kLanes>(s);
        moment += sum_lanes<kLanes>(m);
      }
      partial[2 * i] = sum;
      partial[2 * i + 1] = moment;
    });
    return;
  }
  const int64_t lanes = p.channels;
  slices.for_each_run([&](int64_t slice, int64_t begin, int64_t end) {
    double* out = partial + slice * lanes * 2;
    for_each_vector(lanes, [&](auto width, int64_t c) {
      constexpr int N = decltype(width)::value;
      using V = Vec<C, N>;
      const V mean = load<V>(norm.mean + c), a = load<V>(norm.scale + c), b = load<V>(norm.shift + c);
      V s{}, m{};
      for (int64_t i = begin; i < end; ++i) {
        const V x = load_compute<N>(z + i * lanes + c);
        const V passed = norm.passed(load_compute<N>(g + i * lanes + c), x, a, b);
        s += passed;
        m += passed * (x - mean);
      }
      for (int k = 0; k < N; ++k) {
        out[2 * (c + k)] = s[k];
        out[2 * (c + k) + 1] = m[k];
      }
    });
  });
}

// The same for max pooling: only the winners of windows have a gradient. One slice per image; the rows of
// `partial` beyond are cleared.
template <typename T, typename WinnerMask>
void reduce_winners(const ReluPoolParams& p, const T* z, const T* grad_y, const WinnerMask* winner_mask,
                    const Norm<T>& norm, double* partial) {
  using C = Compute<T>;
  const int64_t plane = p.input_size[0] * p.input_size[1], pooled = p.output_size[0] * p.output_size[1];
  const int64_t width = p.input_size[1];
  std::fill_n(partial, norm_partials(p), 0.0);
  if (!p.channels_last) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, pooled));
    at::parallel_for(0, p.batch * p.channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = z + i * plane;
        const C mean = norm.mean[i % p.channels];
        double sum = 0, moment = 0;
        for (int64_t py = 0; py < p.output_size[0]; ++py) {
          const int64_t top = window_span(p, 0, py).origin;
          C s = 0, m = 0;
          for (int64_t px = 0; px < p.output_size[1]; ++px) {
            const int64_t in = i * pooled + py * p.output_size[1] + px;
            const WinnerMask won = winner_mask[in];
            const int64_t kh = static_cast<uint32_t>(won) / static_cast<uint32_t>(p.window.size[1]);
            const int64_t h = top + kh, w = window_span(p, 1, px).origin + won - kh * p.window.size[1];
            const bool counts = won != kNoWinner<WinnerMask> && is_inside(p, h, w);
            const C g = counts ? static_cast<C>(grad_y[in]) : C(0);
            s += g;
            m += counts ? g * (static_cast<C>(from[h * width + w]) - mean) : C(0);
          }
          sum += s;
          moment += m;
        }
        partial[2 * i] = sum;
        partial[2 * i + 1] = moment;
      }
    });
    return;
  }
  const int64_t lanes = p.channels, rows = p.batch * p.output_size[0];
  const int64_t slices = std::min(norm_slices(p), rows);
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      double* out = partial + slice * lanes * 2;
      const int64_t first = rows * slice / slices, last = rows * (slice + 1) / slices;
      for_each_vector(lanes, [&](auto vector, int64_t c) {
        constexpr int N = decltype(vector)::value;
        using V = Vec<C, N>;
        using Index = typename Winner<V>::Index;
        const V mean = load<V>(norm.mean + c);
        for (int64_t row = first; row < last; ++row) {
          const int64_t image = row / p.output_size[0], py = row % p.output_size[0];
          const Span over = window_span(p, 0, py);
          V s{}, m{};
          for (int64_t px = 0; px < p.output_size[1]; ++px) {
            const Span across = window_span(p, 1, px);
            const int64_t in = (row * p.output_size[1] + px) * lanes + c;
            const V g = load_compute<N>(grad_y + in);
            const Index won = convert_integers<Index>(load<Vec<WinnerMask, N>>(winner_mask + in));
            for (int64_t h = over.begin; h < over.end; ++h) {
              for (int64_t w = across.begin; w < across.end; ++w) {
                const auto here = static_cast<typename Winner<V>::Position>(
                    (h - over.origin) * p.window.size[1] + w - across.origin);
                const Index counts = won == Index{} + here;
                const V x = load_compute<N>(z + ((image * p.input_size[0] + h) * width + w) * lanes + c);
                s += counts ? g : V{};
                m += counts ? g * (x - mean) : V{};
              }
            }
          }
          for (int k = 0; k < N; ++k) {
            out[2 * (c + k)] += s[k];
            out[2 * (c + k) + 1] += m[k];
          }
        }
      });
    }
  });
}

template <typename T>
void gradient_of_average(ReluPoolParams p, const T* grad_y, T* grad_z) {
  p.activation = Activation::none;
  backward_avg(p, grad_y, nullptr, grad_z);
}

template <typename T>
void reduce_any(const ReluPoolParams& p, const T* z, const T* grad_y, const void* winner_mask,
                const Norm<T>& norm, double* partial, T* grad_z) {
  switch (p.pool) {
    case Pool::none:
      return reduce_dense(p, z, grad_y, norm, partial);
    case Pool::avg:
      gradient_of_average(p, grad_y, grad_z);
      return reduce_dense(p, z, grad_z, norm, partial);
    case Pool::max:
      if (p.wide_winner_mask()) {
        return reduce_winners(p, z, grad_y, static_cast<const int32_t*>(winner_mask), norm, partial);
      }
      return reduce_winners(p, z, grad_y, static_cast<const uint8_t*>(winner_mask), norm, partial);
  }
}

template <typename T>
Norm<T> norm_of(const ReluPoolParams& p, const void* scale, const void* shift, const void* mean,
                const void* by_z, const void* offset) {
  using C = Compute<T>;
  return {static_cast<const C*>(scale),  static_cast<const C*>(shift),
          static_cast<const C*>(mean),   static_cast<const C*>(by_z),
          static_cast<const C*>(offset), p.activation == Activation::relu && p.pool != Pool::max};
}

void norm_reduce(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y,
                 const void* winner_mask, const void* scale, const void* shift, const void* mean,
                 double* partial, const void* vectors_, void* grad_z, void* /*stream*/) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Norm<T> norm = norm_of<T>(p, scale, shift, mean, nullptr, nullptr);
    reduce_any(p, static_cast<const T*>(z), static_cast<const T*>(grad_y), winner_mask, norm, partial,
               static_cast<T*>(grad_z));
    const int64_t slices = norm_slices(p), numbers = 2 * p.channels;
    double* total = partial + slices * numbers;
    add_slices(partial, slices, numbers, total);
    const auto& vectors = *static_cast<const GradientVectors<Compute<T>>*>(vectors_);
    for (int64_t c = 0; c < p.channels; ++c) {
      vectors.set(c, total[2 * c], total[2 * c + 1]);
      vectors.run(c);
    }
  });
}

// grad_z of one channel's plane, or of `pixels` of a channels_last tensor, from g, which may be grad_z.
template <typename T>
DLFAST_INLINE void finish_plane(const Norm<T>& norm, int64_t c, const T* z, const T* g, T* grad_z,
                                int64_t plane) {
  for_each_vector(plane, [&](auto width, int64_t at) {
    constexpr int N = decltype(width)::value;
    using V = Vec<Compute<T>, N>;
    const V x = load_compute<N>(z + at);
    const V passed =
        norm.passed(load_compute<N>(g + at), x, broadcast<V>(norm.scale[c]), broadcast<V>(norm.shift[c]));
    V result = passed * norm.scale[c];
    if (norm.by_z != nullptr) result += (x - norm.mean[c]) * norm.by_z[c] + norm.offset[c];
    store_compute<N>(grad_z + at, result);
  });
}

template <typename T>
void finish_pixels(const Norm<T>& norm, int64_t lanes, const T* z, const T* g, T* grad_z, int64_t begin,
                   int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for_each_vector(lanes, [&](auto width, int64_t c) {
      constexpr int N = decltype(width)::value;
      using V = Vec<Compute<T>, N>;
      const V x = load_compute<N>(z + i * lanes + c);
      const V a = load<V>(norm.scale + c);
      const V passed = norm.passed(load_compute<N>(g + i * lanes + c), x, a, load<V>(norm.shift + c));
      V result = passed * a;
      if (norm.by_z != nullptr) {
        result += (x - load<V>(norm.mean + c)) * load<V>(norm.by_z + c) + load<V>(norm.offset + c);
      }
      store_compute<N>(grad_z + i * lanes + c, result);
    });
  }
}

template <typename T, typename WinnerMask>
void backward_planes(const ReluPoolParams& p, const T* z, const T* grad_y, const WinnerMask* winner_mask,
                     const Norm<T>& norm, T* grad_z) {
  const Slices slices(p);
  ReluPoolParams one = p;
  one.batch = one.channels = 1;
  const int64_t pooled = p.output_size[0] * p.output_size[1];
  // Spread and finished while the plane is in the cache.
  slices.for_each_plane([&](int64_t i) {
    T* to = grad_z + i * slices.plane;
    backward_max(one, grad_y + i * pooled, winner_mask + i * pooled, to);
    finish_plane(norm, i % p.channels, z + i * slices.plane, to, to, slices.plane);
  });
}

template <typename T>
void backward_any(const ReluPoolParams& p, const T* z, const T* grad_y, const void* winner_mask,
                  const Norm<T>& norm, T* grad_z) {
  const T* g = p.pool == Pool::none ? grad_y : grad_z;
  if (p.pool == Pool::max) {
    const auto* narrow = static_cast<const uint8_t*>(winner_mask);
    const auto* wide = static_cast<const int32_t*>(winner_mask);
    if (!p.channels_last) {
      return p.wide_winner_mask() ? backward_planes(p, z, grad_y, wide, norm, grad_z)
                                  : backward_planes(p, z, grad_y, narrow, norm, grad_z);
    }
    p.wide_winner_mask() ? backward_max(p, grad_y, wide, grad_z) : backward_max(p, grad_y, narrow, grad_z);
  }
  const Slices slices(p);
  if (p.channels_last) {
    return slices.for_each_run([&](int64_t, int64_t begin, int64_t end) {
      finish_pixels(norm, p.channels, z, g, grad_z, begin, end);
    });
  }
  slices.for_each_plane([&](int64_t i) {
    const int64_t at = i * slices.plane;
    finish_plane(norm, i % p.channels, z + at, g + at, grad_z + at, slices.plane);
  });
}

void norm_backward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y,
                   const void* winner_mask, const void* scale, const void* shift, const void* mean,
                   const void* by_z, const void* offset, void* grad_z, void* /*stream*/) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    backward_any(p, static_cast<const T*>(z), static_cast<const T*>(grad_y), winner_mask,
                 norm_of<T>(p, scale, shift, mean, by_z, offset), static_cast<T*>(grad_z));
  });
}

}  // namespace dlfast::DLFAST_LEVEL
