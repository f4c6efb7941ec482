// Sums over the channels of a tensor in slices, and the moments that come of them, for every dtype and
// layout.
#pragma once

#include "core/level.h"
#include "norm/cpu/slices.h"
#include "norm/kernels.h"
#include "pool/cpu/relu_pool.h"

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

void norm_moments(const ReluPoolParams& p, Dtype dtype, const void* z, double* partial, const void* vectors_,
                  void* /*stream*/) {
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
    const auto& vectors = *static_cast<const TransformVectors<Compute<T>>*>(vectors_);
    for (int64_t c = 0; c < channels; ++c) {
      const double var = squares[c] / count;
      vectors.set(c, mean[c], var < 0 ? 0.0 : var);
      vectors.run(c);
    }
  });
}

}  // namespace dlfast::DLFAST_LEVEL
