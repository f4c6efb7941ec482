// Device bodies of y = pool(activation(before(z))), with winner_masks. No Torch, no launch. What comes before
// the activation is per channel: AddBias, or that of a normalisation (norm/cuda/kernel_norm.cuh).
//
//   ForwardGather         any window, any layout; one thread per pooled element, or per pack of channels
//   ForwardChannels2x2    2x2 windows, stride 2, all inside; channels_last, packs of channels
//   ForwardRows2x2        the same windows; contiguous, packs along two rows
//   ForwardStaged         any window; contiguous, the rows pass through shared memory in 16-byte accesses
//   ForwardElementwise    without pooling
//   ForwardMask           the mask of average pooling after ReLU, where no body above writes it on its way
//
// z [N, C, H, W], y [N, C, PH, PW], winner mask as params.h says or null.
#pragma once

#include "pool/cuda/kernel_relu_pool.cuh"

namespace dlfast {

// z + bias.
template <typename T>
struct AddBias {
  static constexpr bool kHasMasks = true;  // whether average pooling may be asked for a mask
  const T* bias;                           // [C], may be null; aligned for packs where N > 1

  // The numbers of N neighbouring channels.
  template <int N>
  struct Values {
    Bias<N, T> bias;
    DLFAST_DEVICE Accumulator<T> of(int i, Accumulator<T> z) const { return z + bias.at[i]; }
  };
  template <int N, typename Index>
  DLFAST_DEVICE Values<N> values(Index channel) const {
    return {Bias<N, T>(bias, channel)};
  }
  DLFAST_DEVICE bool is_nothing() const { return bias == nullptr; }
};

// One pooled element per i < N. z points at the plane's pixel (0, 0); steps are in elements.
template <Pool kPool, int N, typename T, typename Index, typename Values, typename Coord>
DLFAST_DEVICE void pool_window(const Geometry<Index>& g, const T* z, Plane<Index> in, const Values& before,
                               Coord row, Coord column, T* y, void* winner_mask, Index offset) {
  const auto h = span_of(g, 0, row);
  const auto w = span_of(g, 1, column);
  const auto width = static_cast<int32_t>(g.size[1]);
  int32_t start = static_cast<int32_t>(h.begin - h.origin) * width + static_cast<int32_t>(w.begin - w.origin);
  Reduction<kPool, T, N> result(start);
#pragma unroll 1
  for (Coord ih = h.begin; ih < h.end; ++ih, start += width) {
    int32_t position = start;
#pragma unroll 2
    for (Coord iw = w.begin; iw < w.end; ++iw, ++position) {
      const auto pack = load_pack<N>(z + in.at(ih, iw));
#pragma unroll
      for (int i = 0; i < N; ++i) result.add(i, before.of(i, widen(pack.at[i])), position, g.relu);
    }
  }
  Pack<T, N> pooled;
  const auto divisor = static_cast<Accumulator<T>>(h.divided_by * w.divided_by);
#pragma unroll
  for (int i = 0; i < N; ++i) pooled.at[i] = result.finish(i, divisor, g.relu);
  store_pack<N>(y + offset, pooled);
  if constexpr (kPool == Pool::max) {
    if (winner_mask != nullptr) store_winner_mask(winner_mask, offset, g.wide_winner_mask, result.where);
  }
}

template <typename T_, int N, Pool kPool, typename Index, typename Before>
struct ForwardGather {
  using T = T_;
  Geometry<Index> g;
  const T* z;
  Before before;
  T* y;
  void* winner_mask;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const auto item = thread.global<Index>();
    if (item >= g.items) return;
    const auto site = site_of<N>(g, item);
    pool_window<kPool, N>(g, z, plane_of(g, site, g.in), before.template values<N>(site.channel), site.h,
                          site.w, y, winner_mask, item * N);
  }
};

// Masks need 8 to divide the channels; every window must lie inside, and every pixel in a window.
template <typename T_, Pool kPool, typename Before>
struct ForwardChannels2x2 {
  using T = T_;
  static constexpr int N = kPackSize<T>;
  Geometry<uint32_t> g;
  const T* z;
  Before before;
  T* y;
  void* winner_mask;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const auto item = thread.global<uint32_t>();
    const bool has_work = item < g.items;
    uint32_t bits[4] = {};
    uint32_t offset[4] = {};
    if (has_work) {
      const auto site = site_of<N>(g, item);
      const auto in = plane_of(g, site, g.in);
      Pack<T, N> pack[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        offset[k] = in.at(2 * site.h + k / 2, 2 * site.w + k % 2);
        pack[k] = load_pack<N>(z + offset[k]);
      }
      const auto b = before.template values<N>(site.channel);
      Reduction<kPool, T, N> result(0);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const auto value = b.of(i, widen(pack[k].at[i]));
          result.add(i, value, k, g.relu);
          if constexpr (kPool == Pool::avg) bits[k] |= (value <= 0 ? 0u : 1u) << i;
        }
      }
      Pack<T, N> pooled;
#pragma unroll
      for (int i = 0; i < N; ++i) pooled.at[i] = result.finish(i, 4, g.relu);
      store_pack<N>(y + item * N, pooled);
      if constexpr (kPool == Pool::max) {
        if (winner_mask != nullptr)
          store_winner_mask(winner_mask, item * N, g.wide_winner_mask, result.where);
      }
    }
    if constexpr (kPool == Pool::avg) {
      if (winner_mask == nullptr) return;
#pragma unroll
      for (int k = 0; k < 4; ++k) store_mask<N>(winner_mask, offset[k], bits[k], has_work);
    }
  }
};

// The grid of items is the plane of y with columns counted in half packs. W is a multiple of a pack, and of 8
// for masks; every window must lie inside, and for masks every pixel in a window.
template <typename T_, Pool kPool, typename Before>
struct ForwardRows2x2 {
  using T = T_;
  static constexpr int N = kPackSize<T>;  // of one row; half as many windows
  Geometry<uint32_t> g;
  const T* z;
  Before before;
  T* y;
  void* winner_mask;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const auto item = thread.global<uint32_t>();
    const bool has_work = item < g.items;
    uint32_t bits[2] = {};
    uint32_t offset[2] = {};
    if (has_work) {
      const auto site = site_of<1>(g, item);
      const auto in = plane_of(g, site, g.in);
      Pack<T, N> pack[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        offset[k] = in.at(2 * site.h + k, N * site.w);
        pack[k] = load_pack<N>(z + offset[k]);
      }
      const auto b = before.template values<1>(site.channel);
      Reduction<kPool, T, N / 2> result(0);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const auto value = b.of(0, widen(pack[k].at[i]));
          result.add(i / 2, value, 2 * k + i % 2, g.relu);
          if constexpr (kPool == Pool::avg) bits[k] |= (value <= 0 ? 0u : 1u) << i;
        }
      }
      Pack<T, N / 2> pooled;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) pooled.at[i] = result.finish(i, 4, g.relu);
      const uint32_t out = plane_of(g, site, g.out).at(site.h, site.w * (N / 2));
      store_pack<N / 2>(y + out, pooled);
      if constexpr (kPool == Pool::max) {
        if (winner_mask != nullptr) store_winner_mask(winner_mask, out, g.wide_winner_mask, result.where);
      }
    }
    if constexpr (kPool == Pool::avg) {
      if (winner_mask == nullptr) return;
#pragma unroll
      for (int k = 0; k < 2; ++k) store_mask<N>(winner_mask, offset[k], bits[k], has_work);
    }
  }
};

// Contiguous only. A block pools either `rows_per_tile` rows of y of one plane, or, where whole planes fit
// (tiles_per_plane == 1), all rows of `planes_per_tile` planes. Its part of z and of y is one stretch of
// memory.
template <typename T_, Pool kPool, typename Before>
struct ForwardStaged {
  using T = T_;
  Geometry<uint32_t> g;  // by_grid: rows and columns of y
  uint32_t planes;       // N * C
  uint32_t planes_per_tile;
  uint32_t tiles_per_plane;
  uint32_t rows_per_tile;
  const T* z;
  Before before;
  T* y;
  void* winner_mask;

  DLFAST_DEVICE void run(Thread thread, void* shared) const {
    const uint32_t group = thread.block / tiles_per_plane;
    const uint32_t first_plane = group * planes_per_tile;
    const uint32_t first_row = (thread.block - group * tiles_per_plane) * rows_per_tile;
    const auto rows = static_cast<uint32_t>(g.out[0]);
    const auto columns = static_cast<uint32_t>(g.out[1]);
    const auto width = static_cast<uint32_t>(g.in[1]);

    uint32_t first_z_row = first_plane * static_cast<uint32_t>(g.in[0]);
    uint32_t z_rows;
    uint32_t y_rows;
    int32_t skipped_rows = 0;  // of the plane, above what is staged
    if (tiles_per_plane == 1) {
      const uint32_t count = planes - first_plane < planes_per_tile ? planes - first_plane : planes_per_tile;
      z_rows = count * static_cast<uint32_t>(g.in[0]);
      y_rows = count * rows;
    } else {
      y_rows = rows - first_row < rows_per_tile ? rows - first_row : rows_per_tile;
      skipped_rows = span_of(g, 0, static_cast<int32_t>(first_row)).begin;
      z_rows = span_of(g, 0, static_cast<int32_t>(first_row + y_rows - 1)).end - skipped_rows;
      first_z_row += skipped_rows;
    }

    T* staged = static_cast<T*>(shared);
    staged += stage(staged, z + first_z_row * width, z_rows * width, thread.index, kThreads);
    __syncthreads();

    const uint32_t offset = (first_plane * rows + first_row) * columns;
    for (uint32_t i = thread.index; i < y_rows * columns; i += kThreads) {
      const auto column = g.by_grid[1].divide(i);
      const auto row = g.by_grid[0].divide(column.quotient + first_row);  // quotient: plane in the tile
      const uint32_t plane = first_plane + row.quotient;
      const Plane<uint32_t> in{(row.quotient * g.in[0] - skipped_rows) * width, width, 1};
      const auto b = before.template values<1>(g.by_channels.divide(plane).remainder);
      pool_window<kPool, 1>(g, staged, in, b, static_cast<int32_t>(row.remainder),
                            static_cast<int32_t>(column.remainder), y, winner_mask, offset + i);
    }
  }
};

// The channels of consecutive elements: each channel holds `inner` of them, then comes the next one.
template <typename Index>
struct ChannelWalk {
  FastDivmod<Index> by_inner;
  FastDivmod<Index> by_channels;
  Index inner;  // 1 if channels_last, else H * W
  Index channels;

  // visit(i, the values for the channel of element first + i) for i in [0, count)
  template <typename Vectors, typename Visit>
  DLFAST_DEVICE void over(const Vectors& vectors, Index first, int count, Visit visit) const {
    const auto place = by_inner.divide(first);
    Index passed = place.remainder;
    Index channel = by_channels.divide(place.quotient).remainder;
    auto value = vectors.template values<1>(channel);
    for (int i = 0; i < count; ++i) {
      visit(i, value);
      if (++passed == inner) {
        passed = 0;
        if (++channel == channels) channel = 0;
        value = vectors.template values<1>(channel);
      }
    }
  }
};

// before(z) of the pack of elements that begins at `first`; entries past the end are not touched.
// `aligned`: z may be read in packs. `in_packs`: what `before` needs too, and no pack crosses the last
// channel.
template <int N, typename T, typename Index, typename Before>
DLFAST_DEVICE void prepared_pack(const ChannelWalk<Index>& walk, const T* z, const Before& before,
                                 Index first, int count, bool aligned, bool in_packs,
                                 Accumulator<T> (&value)[N]) {
  Pack<T, N> pack;
  if (aligned && count == N) {
    pack = load_pack<N>(z + first);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = z[first + (i < count ? i : 0)];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = widen(pack.at[i]);
  if (before.is_nothing()) return;
  if (in_packs && count == N) {
    const auto b = before.template values<N>(walk.by_channels.divide(first).remainder);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = b.of(i, value[i]);
  } else {
    walk.over(before, first, N, [&](int i, const auto& b) { value[i] = b.of(0, value[i]); });
  }
}

template <typename T_, typename Index, typename Before>
struct ForwardElementwise {
  using T = T_;
  static constexpr int N = kPackSize<T>;
  Index numel;
  ChannelWalk<Index> walk;
  bool aligned;   // z and y
  bool in_packs;  // see prepared_pack
  bool relu;
  const T* z;
  Before before;
  T* y;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const Index first = thread.global<Index>() * N;
    if (first >= numel) return;
    const int count = numel - first < N ? static_cast<int>(numel - first) : N;
    Accumulator<T> value[N];
    prepared_pack<N>(walk, z, before, first, count, aligned, in_packs, value);
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.at[i] = narrow<T>(relu ? relu_of(value[i]) : value[i]);
    if (aligned && count == N) {
      store_pack<N>(y + first, result);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i < count) y[first + i] = result.at[i];
      }
    }
  }
};

template <typename T_, typename Index, typename Before>
struct ForwardMask {
  using T = T_;
  static constexpr int N = kPackSize<T>;
  Index numel;
  ChannelWalk<Index> walk;
  bool aligned;  // z
  bool in_packs;
  const T* z;
  Before before;
  void* winner_mask;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const Index first = thread.global<Index>() * N;
    const bool has_work = first < numel;
    uint32_t bits = 0;
    if (has_work) {
      const int count = numel - first < N ? static_cast<int>(numel - first) : N;
      Accumulator<T> value[N];
      prepared_pack<N>(walk, z, before, first, count, aligned, in_packs, value);
#pragma unroll
      for (int i = 0; i < N; ++i) bits |= (i >= count || value[i] <= 0 ? 0u : 1u) << i;
    }
    store_mask<N>(winner_mask, first, bits, has_work);
  }
};

}  // namespace dlfast
