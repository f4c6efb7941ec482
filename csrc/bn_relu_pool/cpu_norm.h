// Batch normalisation around the pass of conv_relu_pool/cpu_relu_pool.h, for every dtype and layout.
#pragma once

namespace dlfast::DLFAST_LEVEL {

// Elements of a plane that are added in T before they are added in double; they stay in the first-level
// cache.
constexpr int64_t kCachedRun = 4096;

// Visits z in runs of elements that one thread reads one after the other: rows of `lanes` channels each, or a
// plane of one channel.
struct Slices {
  int64_t channels, plane, pixels, run, count;
  bool channels_last;
  explicit Slices(const ReluPoolParams& p)
      : channels(p.channels),
        plane(p.input_size[0] * p.input_size[1]),
        pixels(p.batch * plane),
        run(slice_pixels(p)),
        count(norm_slices(p)),
        channels_last(p.channels_last) {}

  // body(slice, first pixel, last pixel) of a channels_last tensor.
  template <typename Body>
  void for_each_run(const Body& body) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        body(s, s * run, std::min(pixels, (s + 1) * run));
      }
    });
  }
  // body(image * channels + channel) of a contiguous tensor.
  template <typename Body>
  void for_each_plane(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, plane));
    at::parallel_for(0, count * channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }
  int64_t length(int64_t slice) const { return channels_last ? std::min(run, pixels - slice * run) : plane; }
};

template <int N, typename V>
DLFAST_INLINE double sum_lanes(V v) {
  double sum = 0;
  for (int i = 0; i < N; ++i) sum += v[i];
  return sum;
}

// Sum and sum of squares about `about` of `n` numbers side by side: vectors first, in four chains.
template <typename T>
DLFAST_INLINE void sums_about(const T* z, int64_t n, Compute<T> about, double* sum, double* squares) {
  using V = Vec<Compute<T>, kLanes>;
  constexpr int chains = 4;
  V s[chains] = {}, q[chains] = {};
  int64_t i = 0;
  for (; i + chains * kLanes <= n; i += chains * kLanes) {
    for (int k = 0; k < chains; ++k) {
      const V d = load_compute<kLanes>(z + i + k * kLanes) - about;
      s[k] += d;
      q[k] += d * d;
    }
  }
  *sum = sum_lanes<kLanes>((s[0] + s[1]) + (s[2] + s[3]));
  *squares = sum_lanes<kLanes>((q[0] + q[1]) + (q[2] + q[3]));
  for (; i < n; ++i) {
    const Compute<T> d = static_cast<Compute<T>>(z[i]) - about;
    *sum += d;
    *squares += static_cast<double>(d) * d;
  }
}

// Mean and sum of squared deviations of one more set of numbers joined to those of `count` numbers.
DLFAST_INLINE void join(double& mean, double& squares, int64_t count, double more_mean, double more_squares,
                        int64_t more) {
  if (more == 0) return;
  const double have = static_cast<double>(count), come = static_cast<double>(more), delta = more_mean - mean;
  mean =
      (mean * have + more_mean * come) / (have + come);  // not mean + delta * ...: an infinite mean stays so
  squares += more_squares + delta * delta * have * come / (have + come);
}

// A mean with what rounding left out of it; an infinite one has no such rest.
DLFAST_INLINE double corrected(double mean, double rest) {
  return rest == rest ? mean + rest : mean;
}

// partial[slice][channel][2]: mean and sum of squared deviations of a slice.
template <typename T>
void slice_moments(const ReluPoolParams& p, const T* z, double* partial) {
  using C = Compute<T>;
  const Slices slices(p);
  if (!p.channels_last) {
    slices.for_each_plane([&](int64_t i) {
      const T* at = z + i * slices.plane;
      double mean = 0, squares = 0;
      for (int64_t begin = 0; begin < slices.plane; begin += kCachedRun) {
        const int64_t n = std::min(kCachedRun, slices.plane - begin);
        double sum, rest, about_mean;
        sums_about(at + begin, n, C(0), &sum, &about_mean);
        const C middle = static_cast<C>(sum / n);
        sums_about(at + begin, n, middle, &rest, &about_mean);
        join(mean, squares, begin, corrected(middle, rest / n), about_mean - rest * rest / n, n);
      }
      partial[2 * i] = mean;
      partial[2 * i + 1] = squares;
    });
    return;
  }
  const int64_t lanes = p.channels;
  slices.for_each_run([&](int64_t slice, int64_t begin, int64_t end) {
    double* out = partial + slice * lanes * 2;
    const double n = static_cast<double>(end - begin);
    for_each_vector(lanes, [&](auto width, int64_t c) {
      constexpr int N = decltype(width)::value;
      using V = Vec<C, N>;
      V sum{};
      for (int64_t i = begin; i < end; ++i) sum += load_compute<N>(z + i * lanes + c);
      const V middle = sum / static_cast<C>(n);
      V rest{}, squares{};
      for (int64_t i = begin; i < end; ++i) {
        const V d = load_compute<N>(z + i * lanes + c) - middle;
        rest += d;
        squares += d * d;
      }
      for (int k = 0; k < N; ++k) {
        const double r = rest[k];
        out[2 * (c + k)] = corrected(middle[k], r / n);
        out[2 * (c + k) + 1] = squares[k] - r * r / n;
      }
    });
  });
}

// The slices' numbers added up, channel by channel, into total[channel][2].
inline void add_slices(const double* partial, int64_t slices, int64_t numbers, double* total) {
  std::fill_n(total, numbers, 0.0);
  for (int64_t s = 0; s < slices; ++s) {
    for (int64_t i = 0; i < numbers; ++i) total[i] += partial[s * numbers + i];
  }
}

void norm_moments(const ReluPoolParams& p, Dtype dtype, const void* z, double* partial, void* mean_,
                  void* var_, void* /*stream*/) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    slice_moments(p, static_cast<const T*>(z), partial);
    const Slices slices(p);
    const int64_t channels = p.channels;
    const double count = static_cast<double>(slices.pixels);
    double* mean = partial + slices.count * channels * 2;
    double* squares = mean + channels;
    std::fill_n(mean, 2 * channels, 0.0);
    for (int64_t s = 0; s < slices.count; ++s) {
      const double share = static_cast<double>(slices.length(s)) / count;
      for (int64_t c = 0; c < channels; ++c) mean[c] += partial[(s * channels + c) * 2] * share;
    }
    for (int64_t s = 0; s < slices.count; ++s) {
      const double length = static_cast<double>(slices.length(s));
      for (int64_t c = 0; c < channels; ++c) {
        const double* of = partial + (s * channels + c) * 2;
        squares[c] += of[1] + length * (of[0] - mean[c]) * (of[0] - mean[c]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double var = squares[c] / count;
      static_cast<Compute<T>*>(mean_)[c] = static_cast<Compute<T>>(mean[c]);
      static_cast<Compute<T>*>(var_)[c] = static_cast<Compute<T>>(var < 0 ? 0.0 : var);
    }
  });
}

void norm_forward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* scale, const void* shift,
                  void* y, void* code, void* /*stream*/) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Affine<T> affine{.bias = nullptr,
                           .scale = static_cast<const Compute<T>*>(scale),
                           .shift = static_cast<const Compute<T>*>(shift)};
    forward_any(p, static_cast<const T*>(z), affine, static_cast<T*>(y),
                p.pool == Pool::max ? code : nullptr);
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
template <typename T, typename Code>
void reduce_winners(const ReluPoolParams& p, const T* z, const T* grad_y, const Code* code,
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
            const Code won = code[in];
            const int64_t kh = static_cast<uint32_t>(won) / static_cast<uint32_t>(p.window.size[1]);
            const int64_t h = top + kh, w = window_span(p, 1, px).origin + won - kh * p.window.size[1];
            const bool counts = won != kNoWinner<Code> && is_inside(p, h, w);
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
            const Index won = convert_integers<Index>(load<Vec<Code, N>>(code + in));
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
void reduce_any(const ReluPoolParams& p, const T* z, const T* grad_y, const void* code, const Norm<T>& norm,
                double* partial, T* grad_z) {
  switch (p.pool) {
    case Pool::none:
      return reduce_dense(p, z, grad_y, norm, partial);
    case Pool::avg:
      gradient_of_average(p, grad_y, grad_z);
      return reduce_dense(p, z, grad_z, norm, partial);
    case Pool::max:
      if (p.wide_code()) {
        return reduce_winners(p, z, grad_y, static_cast<const int32_t*>(code), norm, partial);
      }
      return reduce_winners(p, z, grad_y, static_cast<const uint8_t*>(code), norm, partial);
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

void norm_reduce(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y, const void* code,
                 const void* scale, const void* shift, const void* mean, double* partial, void* sum_g,
                 void* sum_gz, void* grad_z, void* /*stream*/) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const Norm<T> norm = norm_of<T>(p, scale, shift, mean, nullptr, nullptr);
    reduce_any(p, static_cast<const T*>(z), static_cast<const T*>(grad_y), code, norm, partial,
               static_cast<T*>(grad_z));
    const int64_t slices = norm_slices(p), numbers = 2 * p.channels;
    double* total = partial + slices * numbers;
    add_slices(partial, slices, numbers, total);
    for (int64_t c = 0; c < p.channels; ++c) {
      static_cast<Compute<T>*>(sum_g)[c] = static_cast<Compute<T>>(total[2 * c]);
      static_cast<Compute<T>*>(sum_gz)[c] = static_cast<Compute<T>>(total[2 * c + 1]);
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

template <typename T, typename Code>
void backward_planes(const ReluPoolParams& p, const T* z, const T* grad_y, const Code* code,
                     const Norm<T>& norm, T* grad_z) {
  const Slices slices(p);
  ReluPoolParams one = p;
  one.batch = one.channels = 1;
  const int64_t pooled = p.output_size[0] * p.output_size[1];
  // Spread and finished while the plane is in the cache.
  slices.for_each_plane([&](int64_t i) {
    T* to = grad_z + i * slices.plane;
    backward_max(one, grad_y + i * pooled, code + i * pooled, to);
    finish_plane(norm, i % p.channels, z + i * slices.plane, to, to, slices.plane);
  });
}

template <typename T>
void backward_any(const ReluPoolParams& p, const T* z, const T* grad_y, const void* code, const Norm<T>& norm,
                  T* grad_z) {
  const T* g = p.pool == Pool::none ? grad_y : grad_z;
  if (p.pool == Pool::max) {
    const auto* narrow = static_cast<const uint8_t*>(code);
    const auto* wide = static_cast<const int32_t*>(code);
    if (!p.channels_last) {
      return p.wide_code() ? backward_planes(p, z, grad_y, wide, norm, grad_z)
                           : backward_planes(p, z, grad_y, narrow, norm, grad_z);
    }
    p.wide_code() ? backward_max(p, grad_y, wide, grad_z) : backward_max(p, grad_y, narrow, grad_z);
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

void norm_backward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y, const void* code,
                   const void* scale, const void* shift, const void* mean, const void* by_z,
                   const void* offset, void* grad_z, void* /*stream*/) {
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    backward_any(p, static_cast<const T*>(z), static_cast<const T*>(grad_y), code,
                 norm_of<T>(p, scale, shift, mean, by_z, offset), static_cast<T*>(grad_z));
  });
}

}  // namespace dlfast::DLFAST_LEVEL
