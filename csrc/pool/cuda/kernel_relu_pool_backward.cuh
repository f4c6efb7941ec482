// Device bodies of grad_z from grad_y and winner_masks, and of the transpose of that map. No Torch, no
// launch.
//
//   BackwardGather        any window, any layout; one thread per pixel, or per pack of its channels
//   BackwardChannels2x2   2x2 windows, stride 2; channels_last, packs of channels
//   BackwardRows2x2       the same windows; contiguous, packs along two rows
//   BackwardStaged        any window; contiguous, grad_y and winner_masks pass through shared memory
//   BackwardElementwise   without pooling; its own transpose
//   TransposeGather       the transpose for any window and layout
//
// Every element of grad_z gathers what its windows send, in the order of the windows: the same bits on every
// run. z [N, C, H, W], y [N, C, PH, PW], winner mask as params.h says.
#pragma once

#include "pool/cuda/kernel_relu_pool.cuh"

namespace dlfast {

// The gradients of one pixel, N channels of it, from all windows that cover it. grad_y and winner mask point
// at the plane's windows as `out` numbers them; with kPool avg the winner mask is not looked at.
template <Pool kPool, int N, typename T, typename Index, typename Coord>
DLFAST_DEVICE void gather_pixel(const Geometry<Index>& g, const T* grad_y, const void* winner_mask,
                                Plane<Index> out, Coord h, Coord w, Accumulator<T> (&sum)[N]) {
  const auto rows = covering(g, 0, h);
  const auto columns = covering(g, 1, w);
  // Few windows cover a pixel; unrolled loops only cost registers.
#pragma unroll 1
  for (Coord row = rows.first; row <= rows.last; ++row) {
#pragma unroll 1
    for (Coord column = columns.first; column <= columns.last; ++column) {
      const Index offset = out.at(row, column);
      const auto grad = load_pack<N>(grad_y + offset);
      const auto sh = span_of(g, 0, row);
      const auto sw = span_of(g, 1, column);
      if constexpr (kPool == Pool::max) {
        const auto position = static_cast<int32_t>((h - sh.origin) * g.size[1] + (w - sw.origin));
        int32_t where[N];
        load_winner_mask(winner_mask, offset, g.wide_winner_mask, where);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (where[i] == position) sum[i] += widen(grad.at[i]);
        }
      } else {
        const auto divisor = static_cast<Accumulator<T>>(sh.divided_by * sw.divided_by);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += widen(grad.at[i]) / divisor;
      }
    }
  }
}

// The pack that goes to memory: average pooling after ReLU lets through what the mask's low bits say.
template <Pool kPool, typename T, int N>
DLFAST_DEVICE Pack<T, N> masked(const Accumulator<T> (&sum)[N], uint32_t bits) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool passes = kPool == Pool::max || ((bits >> i) & 1u) != 0;
    pack.at[i] = narrow<T>(passes ? sum[i] : Accumulator<T>(0));
  }
  return pack;
}

constexpr uint32_t kAllBits = 0xffffffffu;

// What becomes of the gradients of N neighbouring elements from `at` on before they go to memory: nothing but
// the mask. kAlong: the neighbours are of one channel, else of as many.
template <typename T>
struct AsItIs {
  template <Pool kPool, bool kAlong, int N, typename Index>
  DLFAST_DEVICE Pack<T, N> pack(const Accumulator<T> (&sum)[N], uint32_t bits, Index /*at*/,
                                Index /*channel*/) const {
    return masked<kPool, T>(sum, bits);
  }
};

template <typename T_, int N, Pool kPool, typename Index, typename Finish = AsItIs<T_>>
struct BackwardGather {
  using T = T_;
  Geometry<Index> g;
  const T* grad_y;
  const void* winner_mask;
  T* grad_z;
  Finish finish;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const auto item = thread.global<Index>();
    if (item >= g.items) return;
    const auto site = site_of<N>(g, item);
    Accumulator<T> sum[N] = {};
    gather_pixel<kPool>(g, grad_y, winner_mask, plane_of(g, site, g.out), site.h, site.w, sum);
    uint32_t bits = kAllBits;
    if (kPool == Pool::avg && g.relu) bits = load_mask(winner_mask, item * N);
    store_pack<N>(grad_z + item * N,
                  finish.template pack<kPool, false>(sum, bits, static_cast<Index>(item * N), site.channel));
  }
};

// The grid of items covers all pixels in boxes of 2x2; the last row and column of boxes may have no window
// and may be cut off by the plane's end.
template <typename T_, Pool kPool, typename Finish = AsItIs<T_>>
struct BackwardChannels2x2 {
  using T = T_;
  static constexpr int N = kPackSize<T>;
  Geometry<uint32_t> g;
  const T* grad_y;
  const void* winner_mask;
  T* grad_z;
  Finish finish;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const auto item = thread.global<uint32_t>();
    if (item >= g.items) return;
    const auto site = site_of<N>(g, item);
    const auto in = plane_of(g, site, g.in);
    Accumulator<T> grad[N] = {};
    int32_t where[N] = {};
    if (site.h < g.out[0] && site.w < g.out[1]) {
      const uint32_t offset = plane_of(g, site, g.out).at(site.h, site.w);
      const auto pack = load_pack<N>(grad_y + offset);
      if constexpr (kPool == Pool::max) load_winner_mask(winner_mask, offset, g.wide_winner_mask, where);
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] = widen(pack.at[i]) * (kPool == Pool::avg ? 0.25f : 1.0f);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int32_t h = 2 * site.h + k / 2;
      const int32_t w = 2 * site.w + k % 2;
      if (h >= g.in[0] || w >= g.in[1]) continue;
      const uint32_t offset = in.at(h, w);
      uint32_t bits = kAllBits;
      if (kPool == Pool::avg && g.relu) bits = load_mask(winner_mask, offset);
      Accumulator<T> sum[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] = kPool == Pool::avg || where[i] == k ? grad[i] : Accumulator<T>(0);
      }
      store_pack<N>(grad_z + offset, finish.template pack<kPool, false>(sum, bits, offset, site.channel));
    }
  }
};

// The grid of items: pairs of rows of z, packs along them. W is a multiple of a pack. A last odd row has no
// window.
template <typename T_, Pool kPool, typename Finish = AsItIs<T_>>
struct BackwardRows2x2 {
  using T = T_;
  static constexpr int N = kPackSize<T>;  // of one row; half as many windows
  Geometry<uint32_t> g;
  const T* grad_y;
  const void* winner_mask;
  T* grad_z;
  Finish finish;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const auto item = thread.global<uint32_t>();
    if (item >= g.items) return;
    const auto site = site_of<1>(g, item);
    const auto in = plane_of(g, site, g.in);
    Accumulator<T> grad[N / 2] = {};
    int32_t where[N / 2] = {};
    if (site.h < g.out[0]) {
      const uint32_t offset = plane_of(g, site, g.out).at(site.h, site.w * (N / 2));
      const auto pack = load_pack<N / 2>(grad_y + offset);
      if constexpr (kPool == Pool::max) load_winner_mask(winner_mask, offset, g.wide_winner_mask, where);
#pragma unroll
      for (int i = 0; i < N / 2; ++i) grad[i] = widen(pack.at[i]) * (kPool == Pool::avg ? 0.25f : 1.0f);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int32_t h = 2 * site.h + k;
      if (h >= g.in[0]) continue;
      const uint32_t offset = in.at(h, N * site.w);
      uint32_t bits = kAllBits;
      if (kPool == Pool::avg && g.relu) bits = load_mask(winner_mask, offset);
      Accumulator<T> sum[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] = kPool == Pool::avg || where[i / 2] == 2 * k + i % 2 ? grad[i / 2] : Accumulator<T>(0);
      }
      store_pack<N>(grad_z + offset, finish.template pack<kPool, true>(sum, bits, offset, site.channel));
    }
  }
};

// Contiguous only, one byte per winner mask. A block writes either `rows_per_tile` rows of grad_z of one
// plane, or, where tiles_per_plane == 1, all rows of `planes_per_tile` planes. What it reads of grad_y and
// winner mask, and what it writes, is one stretch of memory each.
template <typename T_, Pool kPool>
struct BackwardStaged {
  using T = T_;
  static constexpr int N = kPackSize<T>;
  Geometry<uint32_t> g;  // by_grid: rows and columns of z
  uint32_t planes;       // N * C
  uint32_t planes_per_tile;
  uint32_t tiles_per_plane;
  uint32_t rows_per_tile;
  uint32_t winner_mask_at;  // bytes of shared memory before the winner_masks
  const T* grad_y;
  const void* winner_mask;
  T* grad_z;

  DLFAST_DEVICE void run(Thread thread, void* shared) const {
    const uint32_t group = thread.block / tiles_per_plane;
    const uint32_t first_plane = group * planes_per_tile;
    const uint32_t first_row = (thread.block - group * tiles_per_plane) * rows_per_tile;
    const auto rows = static_cast<uint32_t>(g.in[0]);
    const auto columns = static_cast<uint32_t>(g.in[1]);
    const auto width = static_cast<uint32_t>(g.out[1]);

    uint32_t first_y_row = first_plane * static_cast<uint32_t>(g.out[0]);
    uint32_t z_rows;
    uint32_t y_rows;
    int32_t skipped_rows = 0;  // of the plane of grad_y, above what is staged
    if (tiles_per_plane == 1) {
      const uint32_t count = planes - first_plane < planes_per_tile ? planes - first_plane : planes_per_tile;
      z_rows = count * rows;
      y_rows = count * static_cast<uint32_t>(g.out[0]);
    } else {
      z_rows = rows - first_row < rows_per_tile ? rows - first_row : rows_per_tile;
      skipped_rows = covering(g, 0, static_cast<int32_t>(first_row)).first;
      const int32_t last = covering(g, 0, static_cast<int32_t>(first_row + z_rows - 1)).last;
      y_rows = last < skipped_rows ? 0 : last - skipped_rows + 1;  // none below the last window
      first_y_row += skipped_rows;
    }

    T* grads = static_cast<T*>(shared);
    grads += stage(grads, grad_y + first_y_row * width, y_rows * width, thread.index, kThreads);
    uint8_t* winner_masks = static_cast<uint8_t*>(shared) + winner_mask_at;
    if constexpr (kPool == Pool::max) {
      const uint8_t* source = static_cast<const uint8_t*>(winner_mask) + first_y_row * width;
      winner_masks += stage(winner_masks, source, y_rows * width, thread.index, kThreads);
    }
    __syncthreads();

    T* target = grad_z + (first_plane * rows + first_row) * columns;
    const uint32_t shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(target) / sizeof(T)) % N;
    const uint32_t count = z_rows * columns;
    for (uint32_t pack = thread.index; pack * N < shift + count; pack += kThreads) {
      const uint32_t begin = pack * N < shift ? 0 : pack * N - shift;  // of the tile's elements
      const uint32_t end = pack * N + N - shift < count ? pack * N + N - shift : count;
      auto column = g.by_grid[1].divide(begin);
      auto row = g.by_grid[0].divide(column.quotient + first_row);  // quotient: plane in the tile
      Pack<T, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const uint32_t element = pack * N + i - shift;  // wraps around before the tile's first
        if (element >= count) continue;
        Accumulator<T> sum[1] = {};
        const Plane<uint32_t> out{(row.quotient * g.out[0] - skipped_rows) * width, width, 1};
        gather_pixel<kPool>(g, grads, winner_masks, out, static_cast<int32_t>(row.remainder),
                            static_cast<int32_t>(column.remainder), sum);
        uint32_t bits = kAllBits;
        if (kPool == Pool::avg && g.relu) {
          bits = load_mask(winner_mask, (first_plane * rows + first_row) * columns + element);
        }
        result.at[i] = masked<kPool, T>(sum, bits).at[0];
        if (++column.remainder == columns) {
          column.remainder = 0;
          if (++row.remainder == rows) {
            row.remainder = 0;
            ++row.quotient;
          }
        }
      }
      if (end - begin == N) {
        store_pack<N>(target + begin, result);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const uint32_t element = pack * N + i - shift;
          if (element < count) target[element] = result.at[i];
        }
      }
    }
  }
};

// winner mask is y, or null where no ReLU stopped anything.
template <typename T_>
struct BackwardElementwise {
  using T = T_;
  static constexpr int N = kPackSize<T>;
  uint64_t numel;
  bool aligned;
  const T* from;
  const T* winner_mask;
  T* to;

  DLFAST_DEVICE T pass(T grad, T y) const { return widen(y) <= 0 ? narrow<T>(0) : grad; }

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const uint64_t first = thread.global<uint64_t>() * N;
    if (first >= numel) return;
    if (aligned && numel - first >= N) {
      auto grad = load_pack<N>(from + first);
      if (winner_mask != nullptr) {
        const auto y = load_pack<N>(winner_mask + first);
#pragma unroll
        for (int i = 0; i < N; ++i) grad.at[i] = pass(grad.at[i], y.at[i]);
      }
      store_pack<N>(to + first, grad);
    } else {
      for (uint64_t i = first; i < first + N && i < numel; ++i) {
        to[i] = winner_mask == nullptr ? from[i] : pass(from[i], winner_mask[i]);
      }
    }
  }
};

template <typename T_, Pool kPool, typename Index>
struct TransposeGather {
  using T = T_;
  Geometry<Index> g;  // by_grid: rows and columns of y
  const T* grad_z;
  const void* winner_mask;
  T* grad_y;

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const auto item = thread.global<Index>();
    if (item >= g.items) return;
    const auto site = site_of<1>(g, item);
    const auto in = plane_of(g, site, g.in);
    const auto h = span_of(g, 0, site.h);
    const auto w = span_of(g, 1, site.w);
    Accumulator<T> sum = 0;
    if constexpr (kPool == Pool::max) {
      int32_t where[1];
      load_winner_mask(winner_mask, item, g.wide_winner_mask, where);
      const auto width = static_cast<int32_t>(g.size[1]);
      const int32_t none = g.wide_winner_mask ? kNoWinner<int32_t> : kNoWinner<uint8_t>;
      const auto ih = h.origin + where[0] / width, iw = w.origin + where[0] % width;
      // Also where somebody made up a winner mask, nothing outside of the window is read.
      if (where[0] != none && ih >= h.begin && ih < h.end && iw >= w.begin && iw < w.end) {
        sum = widen(grad_z[in.at(ih, iw)]);
      }
    } else {
      for (auto ih = h.begin; ih < h.end; ++ih) {
        for (auto iw = w.begin; iw < w.end; ++iw) {
          const Index offset = in.at(ih, iw);
          if (!g.relu || (load_mask(winner_mask, offset) & 1u) != 0) sum += widen(grad_z[offset]);
        }
      }
      sum /= static_cast<Accumulator<T>>(h.divided_by * w.divided_by);
    }
    grad_y[item] = narrow<T>(sum);
  }
};

}  // namespace dlfast
