// What a normalisation reduces to two numbers per channel, by the walks of kernel_channel_sums.cuh. No Torch,
// no launch.
//
//   Moments   of z: its mean and its sum of squared deviations
//   Dense     of g and z: the sums of g and of g * (z - mean), g stopped where z * scale + shift is 0 or less
//   Winners   the same for max pooling: g are the pooled gradients, each with the z at its window's winner
//   Whole     what the blocks leave, put together in double
#pragma once

#include "norm/cuda/kernel_norm.cuh"
#include "pool/cuda/kernel_channel_sums.cuh"

namespace dlfast::norm_sums {

using channel_sums::Place;

// Of a channel, or of a part of it.
template <typename Acc>
struct Pair {
  Acc first, second;
};

// What a block leaves of a channel.
struct Partial {
  double count, first, second;
};

template <typename Acc>
struct Pairs {
  using Total = Pair<Acc>;
  using Left = Partial;
  DLFAST_DEVICE static Left left(Total total, int32_t count) {
    return {static_cast<double>(count), total.first, total.second};
  }
};

// Sums about the first element that a thread meets: deviations from it are small beside what varies, so that
// squares do not cancel. Where that element is not finite it is no place to stand on.
template <typename T_>
struct Moments : Pairs<Accumulator<T_>> {
  using T = T_;
  using Acc = Accumulator<T>;
  static constexpr bool kMoments = true;
  static constexpr int kUnroll = 4;
  const T* z;

  template <int N, bool kRows>
  struct State {
    Acc about[N], sum[N] = {}, squares[N] = {};
  };

  template <int N, bool kRows>
  DLFAST_DEVICE State<N, kRows> begin(Place place) const {
    State<N, kRows> s;
    const auto pack = load_pack<N>(z + place.offset);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Acc x = widen(pack.at[i]);
      s.about[i] = x - x == 0 ? x : Acc(0);
    }
    return s;
  }
  template <int N, bool kRows>
  DLFAST_DEVICE void add(State<N, kRows>& s, Place place) const {
    const auto pack = load_pack<N>(z + place.offset);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Acc d = widen(pack.at[i]) - s.about[i];
      s.sum[i] += d;
      s.squares[i] += d * d;
    }
  }
  template <int N, bool kRows>
  DLFAST_DEVICE Pair<Acc> total(const State<N, kRows>& s, int i, int32_t count) const {
    const Acc mean = s.sum[i] / static_cast<Acc>(count);
    return {s.about[i] + mean, s.squares[i] - s.sum[i] * mean};
  }
  // Weighted means rather than a mean and a part of the difference: an infinite one stays infinite.
  DLFAST_DEVICE static Pair<Acc> joined(Pair<Acc> a, int32_t a_count, Pair<Acc> b, int32_t b_count) {
    const Acc of_b = static_cast<Acc>(b_count) / static_cast<Acc>(a_count + b_count), of_a = 1 - of_b;
    const Acc apart = b.first - a.first;
    return {a.first * of_a + b.first * of_b,
            a.second + b.second + apart * apart * (static_cast<Acc>(a_count) * of_b)};
  }
};

// What the two kinds of gradient sums have in common. Neighbours in a row have a channel each, in a plane
// they share one.
template <typename T_>
struct GradientSums : Pairs<Accumulator<T_>> {
  using T = T_;
  using Acc = Accumulator<T>;
  static constexpr bool kMoments = false;
  static constexpr int kUnroll = 2;  // more, and the registers of packs of 16 bits do not do
  const T* z;
  const T* g;
  const Acc* mean;

  template <int N, bool kRows>
  struct Sums {
    static constexpr int M = kRows ? N : 1;  // channels
    Pack<Acc, M> mean;
    Acc sum[N] = {}, moment[N] = {};

    DLFAST_DEVICE void add(int i, Acc gradient, Acc at) {
      sum[i] += gradient;
      moment[i] += gradient * (at - mean.at[kRows ? i : 0]);
    }
  };
  template <int N, bool kRows>
  DLFAST_DEVICE Pair<Acc> total(const Sums<N, kRows>& s, int i, int32_t /*count*/) const {
    return {s.sum[i], s.moment[i]};
  }
  DLFAST_DEVICE static Pair<Acc> joined(Pair<Acc> a, int32_t, Pair<Acc> b, int32_t) {
    return {a.first + b.first, a.second + b.second};
  }
};

template <typename T>
struct Dense : GradientSums<T> {
  using Acc = Accumulator<T>;
  using Base = GradientSums<T>;
  Affine<T> before;
  bool relu;

  template <int N, bool kRows>
  struct State : Base::template Sums<N, kRows> {
    typename Affine<T>::template Values<kRows ? N : 1> before;
  };

  template <int N, bool kRows>
  DLFAST_DEVICE State<N, kRows> begin(Place place) const {
    constexpr int M = State<N, kRows>::M;
    return {{load_pack<M>(this->mean + place.channel)}, before.template values<M>(place.channel)};
  }
  template <int N, bool kRows>
  DLFAST_DEVICE void add(State<N, kRows>& s, Place place) const {
    const auto x = load_pack<N>(this->z + place.offset);
    const auto gradient = load_pack<N>(this->g + place.offset);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Acc at = widen(x.at[i]);
      const bool dead = relu && s.before.of(kRows ? i : 0, at) <= 0;
      s.add(i, dead ? Acc(0) : widen(gradient.at[i]), at);
    }
  }
};

template <typename T, typename Index>
struct Winners : GradientSums<T> {
  using Acc = Accumulator<T>;
  using Base = GradientSums<T>;
  Geometry<Index> geometry;       // by_grid: rows and columns of y
  FastDivmod<uint32_t> by_width;  // of the window
  const void* winner_mask;

  template <int N, bool kRows>
  struct State : Base::template Sums<N, kRows> {};

  template <int N, bool kRows>
  DLFAST_DEVICE State<N, kRows> begin(Place place) const {
    return {{load_pack<State<N, kRows>::M>(this->mean + place.channel)}};
  }
  template <int N, bool kRows>
  DLFAST_DEVICE void add(State<N, kRows>& s, Place place) const {
    using Coord = typename Geometry<Index>::Coord;
    const Geometry<Index>& g = geometry;
    int32_t where[N];
    load_winner_mask(winner_mask, place.offset, g.wide_winner_mask, where);
    const auto gradient = load_pack<N>(this->g + place.offset);
    const int32_t none = g.wide_winner_mask ? kNoWinner<int32_t> : kNoWinner<uint8_t>;
    const auto column = g.by_grid[1].divide(static_cast<Index>(kRows ? place.outer : place.at));
    const auto row = g.by_grid[0].divide(column.quotient);
    const Site<Index> site{kRows ? row.quotient : static_cast<Index>(place.outer),
                           static_cast<Index>(place.channel), 0, 0};
    const auto in = plane_of(g, site, g.in);
    // Between the channels of a row; it may be one of planes that pooling leaves one element each.
    const Index apart = g.channels_last ? 1 : static_cast<Index>(g.in[0] * g.in[1]);
    auto y = static_cast<Coord>(column.remainder);
    Coord top = static_cast<Coord>(row.remainder) * g.stride[0] - g.padding[0];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto position = by_width.divide(static_cast<uint32_t>(where[i]) & 0x7fffffffu);
      const Coord h = top + static_cast<Coord>(position.quotient);
      const Coord w = y * g.stride[1] - g.padding[1] + static_cast<Coord>(position.remainder);
      // Also where somebody made up a winner mask, nothing outside of the plane is read.
      if (where[i] != none && h >= 0 && h < g.in[0] && w >= 0 && w < g.in[1]) {
        const Index at = in.at(h, w) + (kRows ? static_cast<Index>(i) * apart : 0);
        s.add(i, widen(gradient.at[i]), widen(this->z[at]));
      }
      if (!kRows && ++y == g.out[1]) {
        y = 0;
        top += g.stride[0];
      }
    }
  }
};

// A block has a few neighbouring channels, whose splits its threads take turns with. Vectors make the rest of
// the two numbers of a channel.
template <typename Vectors, bool kMoments>
struct Whole {
  static constexpr int64_t kShared = kThreads * sizeof(double);
  static constexpr int32_t kChannels = 8, kTurns = static_cast<int32_t>(kThreads) / kChannels;
  Vectors vectors;
  int32_t splits;
  double count;  // elements of a channel
  const Partial* partial;

  // The sum over all splits, in every thread of the channel.
  template <typename Term>
  DLFAST_DEVICE double sum(int32_t thread, void* shared, int64_t channel, Term term) const {
    double mine = 0;
    const int64_t channels = vectors.channels;
    if (channel < channels) {
#pragma unroll 4
      for (int32_t split = thread / kChannels; split < splits; split += kTurns) {
        const Partial of = partial[split * channels + channel];
        if (of.count > 0) mine += term(of);
      }
    }
    auto* sums = static_cast<double*>(shared);
    __syncthreads();
    sums[thread] = mine;
    __syncthreads();
    mine = sums[thread % kChannels];
    for (int32_t turn = 1; turn < kTurns; ++turn) mine += sums[turn * kChannels + thread % kChannels];
    return mine;
  }

  DLFAST_DEVICE void run(uint32_t block, int32_t thread, void* shared) const {
    const int64_t channel = int64_t{block} * kChannels + thread % kChannels;
    double a, b;
    if constexpr (kMoments) {
      a = sum(thread, shared, channel, [](Partial of) { return of.first * of.count; }) / count;
      b = sum(thread, shared, channel,
              [a](Partial of) { return of.second + of.count * (of.first - a) * (of.first - a); });
      b = b < 0 ? 0 : b / count;
    } else {
      a = sum(thread, shared, channel, [](Partial of) { return of.first; });
      b = sum(thread, shared, channel, [](Partial of) { return of.second; });
    }
    if (thread >= kChannels || channel >= vectors.channels) return;
    vectors.set(channel, a, b);
    vectors.run(channel);
  }
};

}  // namespace dlfast::norm_sums
