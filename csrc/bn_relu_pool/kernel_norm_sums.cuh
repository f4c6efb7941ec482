// Device bodies that reduce a tensor to two numbers per channel, for a normalisation. No Torch, no launch.
//
//   OverRows    [rows][C]: threads have packs of channels
//   OverPlanes  [outer][C][inner]: warps have pieces of planes
//   Whole       what the blocks of either leave, put together in double
//
// What is reduced, and how, is said by the elements:
//   Moments   of z: its mean and its sum of squared deviations
//   Dense     of g and z: the sums of g and of g * (z - mean), g stopped where z * scale + shift is 0 or less
//   Winners   the same for max pooling: g are the pooled gradients, each with the z at its window's winner
//
// The order of every sum follows from the sizes alone.
#pragma once

#include "bn_relu_pool/kernel_norm.cuh"

namespace dlfast::norm_sums {

constexpr int32_t kWarps = static_cast<int32_t>(kThreads) / 32;

// Of `count` elements of a channel.
template <typename Acc>
struct Pair {
  Acc first, second;
};

// Where a pack lies: `outer` counts rows, or images, of which `at` is the first element's place in the plane.
struct Place {
  int64_t outer, at;
  int64_t offset;  // in the tensor that is walked through
  int64_t channel;
};

// Sums about the first element that a thread meets: deviations from it are small beside what varies, so that
// squares do not cancel. Where that element is not finite it is no place to stand on.
template <typename T_>
struct Moments {
  using T = T_;
  using Acc = Accumulator<T>;
  static constexpr bool kMoments = true;
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
  DLFAST_DEVICE Pair<Acc> of(const State<N, kRows>& s, int i, int32_t count) const {
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
struct GradientSums {
  using T = T_;
  using Acc = Accumulator<T>;
  static constexpr bool kMoments = false;
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
  DLFAST_DEVICE Pair<Acc> of(const Sums<N, kRows>& s, int i, int32_t /*count*/) const {
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
  Geometry<Index> geometry;    // by_grid: rows and columns of y
  Divider<uint32_t> by_width;  // of the window
  const void* code;

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
    load_codes(code, place.offset, g.wide_code, where);
    const auto gradient = load_pack<N>(this->g + place.offset);
    const int32_t none = g.wide_code ? kNoWinner<int32_t> : kNoWinner<uint8_t>;
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
      // Also where somebody made up a code, nothing outside of the plane is read.
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

// What a block leaves of a channel.
struct Partial {
  double count, first, second;
};

constexpr int64_t shared_bytes(int64_t packs, int64_t accumulator) {
  return kThreads * (2 * packs * accumulator + static_cast<int64_t>(sizeof(int32_t)));
}

// The numbers of N channels of all threads that share them, which are `step` apart, joined in the first of
// them. Counts may be zero.
template <typename Elements, int N>
DLFAST_DEVICE int32_t join_block(Pair<typename Elements::Acc> (&mine)[N], int32_t count, int32_t thread,
                                 int32_t step, void* shared) {
  using Acc = typename Elements::Acc;
  constexpr auto threads = static_cast<int32_t>(kThreads);
  auto* pairs = static_cast<Pair<Acc>*>(shared);  // [N][kThreads]
  auto* counts = reinterpret_cast<int32_t*>(pairs + N * threads);
  for (int32_t distance = threads / 2; distance >= step; distance /= 2) {
    __syncthreads();
    if (thread >= distance && thread < 2 * distance) {
#pragma unroll
      for (int i = 0; i < N; ++i) pairs[i * threads + thread] = mine[i];
      counts[thread] = count;
    }
    __syncthreads();
    if (thread >= distance) continue;
    const int32_t other = counts[thread + distance];
    if (other == 0) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Pair<Acc> theirs = pairs[i * threads + thread + distance];
      mine[i] = count == 0 ? theirs : Elements::joined(mine[i], count, theirs, other);
    }
    count += other;
  }
  return count;
}

// Blocks: channel groups, then splits of the rows.
template <typename Elements_, int N>
struct OverRows {
  using Elements = Elements_;
  using T = typename Elements::T;
  using Acc = typename Elements::Acc;
  static constexpr int64_t kShared = shared_bytes(N, sizeof(Acc));
  Elements elements;
  int64_t rows, channels;
  int32_t groups, packs;  // channel groups, and packs in each: a power of two that divides kThreads
  int32_t splits;
  Partial* partial;  // [splits][C]

  DLFAST_DEVICE void run(Thread where, void* shared) const {
    const auto thread = static_cast<int32_t>(where.index);
    const int64_t group = where.block % static_cast<uint32_t>(groups),
                  split = where.block / static_cast<uint32_t>(groups);
    const int64_t channel = (group * packs + thread % packs) * N;
    const int32_t step = static_cast<int32_t>(kThreads) / packs;
    const int64_t begin = rows * split / splits + thread / packs, end = rows * (split + 1) / splits;
    Pair<Acc> mine[N] = {};
    int32_t count = 0;
    if (channel < channels && begin < end) {
      const auto place = [&](int64_t row) {
        return Place{.outer = row, .at = 0, .offset = row * channels + channel, .channel = channel};
      };
      auto state = elements.template begin<N, true>(place(begin));
#pragma unroll 4
      for (int64_t row = begin; row < end; row += step) elements.add(state, place(row));
      count = static_cast<int32_t>((end - begin + step - 1) / step);
#pragma unroll
      for (int i = 0; i < N; ++i) mine[i] = elements.of(state, i, count);
    }
    count = join_block<Elements, N>(mine, count, thread, packs, shared);
    if (thread >= packs || channel >= channels) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      partial[split * channels + channel + i] = {static_cast<double>(count), mine[i].first, mine[i].second};
    }
  }
};

// Blocks: channels, then splits of the pieces. Piece i is the (i % pieces)-th of plane i / pieces. All
// pieces of a channel are numbered by 32 bits, whose division is cheap.
template <typename Elements_, int N>
struct OverPlanes {
  using Elements = Elements_;
  using T = typename Elements::T;
  using Acc = typename Elements::Acc;
  static constexpr int64_t kShared = shared_bytes(1, sizeof(Acc));
  Elements elements;
  int64_t inner, piece;       // elements of a plane and of a piece, the latter a multiple of N
  uint32_t channels, pieces;  // pieces: of a plane
  uint32_t all, per_split;    // pieces: of a channel, and of a split of them
  Partial* partial;           // [splits][C]

  DLFAST_DEVICE void run(Thread where, void* shared) const {
    const auto thread = static_cast<int32_t>(where.index);
    const uint32_t split = where.block / channels, channel = where.block - split * channels;
    const uint32_t begin_piece = split * per_split + where.index / 32;
    const uint32_t end_piece = min((split + 1) * per_split, all);
    typename Elements::template State<N, false> state;
    int32_t count = 0;
    for (uint32_t i = begin_piece; i < end_piece; i += kWarps) {
      const uint32_t plane = i / pieces;
      const int64_t begin = (i - plane * pieces) * piece;
      const int64_t end = begin + piece < inner ? begin + piece : inner;
      const int64_t origin = (int64_t{plane} * channels + channel) * inner;
      const auto place = [&](int64_t at) {
        return Place{.outer = plane, .at = at, .offset = origin + at, .channel = channel};
      };
      const int64_t first = begin + thread % 32 * N;
      if (first >= end) continue;
      if (count == 0) state = elements.template begin<N, false>(place(first));
#pragma unroll 4
      for (int64_t at = first; at < end; at += 32 * N) elements.add(state, place(at));
      count += static_cast<int32_t>((end - first + 32 * N - 1) / (32 * N));
    }
    Pair<Acc> mine[1] = {};
    if (count > 0) {
      mine[0] = elements.of(state, 0, count);
#pragma unroll
      for (int i = 1; i < N; ++i) {
        mine[0] = Elements::joined(mine[0], i * count, elements.of(state, i, count), count);
      }
    }
    count = join_block<Elements, 1>(mine, N * count, thread, 1, shared);
    if (thread != 0) return;
    partial[int64_t{split} * channels + channel] = {static_cast<double>(count), mine[0].first,
                                                    mine[0].second};
  }
};

// A block has 32 neighbouring channels, its warps take turns with the splits.
template <typename Acc, bool kMoments>
struct Whole {
  static constexpr int64_t kShared = kThreads * sizeof(double);
  int64_t channels;
  int32_t splits;
  double count;  // elements of a channel
  const Partial* partial;
  Acc* first;
  Acc* second;

  // The sum over all splits, in every thread of the channel.
  template <typename Term>
  DLFAST_DEVICE double sum(Thread where, void* shared, bool exists, int64_t channel, Term term) const {
    const uint32_t lane = where.index % 32;
    double mine = 0;
    if (exists) {
#pragma unroll 4
      for (auto split = static_cast<int32_t>(where.index / 32); split < splits; split += kWarps) {
        const Partial of = partial[split * channels + channel];
        if (of.count > 0) mine += term(of);
      }
    }
    auto* sums = static_cast<double*>(shared);
    __syncthreads();
    sums[where.index] = mine;
    __syncthreads();
    mine = sums[lane];
    for (int32_t other = 1; other < kWarps; ++other) mine += sums[other * 32 + lane];
    return mine;
  }

  DLFAST_DEVICE void run(Thread where, void* shared) const {
    const int64_t channel = int64_t{where.block} * 32 + where.index % 32;
    const bool exists = channel < channels;
    double a, b;
    if constexpr (kMoments) {
      a = sum(where, shared, exists, channel, [](Partial of) { return of.first * of.count; }) / count;
      b = sum(where, shared, exists, channel,
              [a](Partial of) { return of.second + of.count * (of.first - a) * (of.first - a); });
      b = b < 0 ? 0 : b / count;
    } else {
      a = sum(where, shared, exists, channel, [](Partial of) { return of.first; });
      b = sum(where, shared, exists, channel, [](Partial of) { return of.second; });
    }
    if (where.index >= 32 || !exists) return;
    first[channel] = static_cast<Acc>(a);
    second[channel] = static_cast<Acc>(b);
  }
};

}  // namespace dlfast::norm_sums
