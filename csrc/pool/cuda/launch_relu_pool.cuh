// Launches of the pass after a convolution: which body takes which problem, for whatever comes before the
// activation. A file that includes this has the kernel and says how it is started: start(body, blocks,
// bytes of shared memory).
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include "core/launch_check.h"
#include "core/math.h"
#include "pool/cuda/kernel_relu_pool_forward.cuh"
#include "pool/kernels.h"

namespace dlfast {

template <typename Start, typename Body>
void start_items(Start start, const Body& body, int64_t items) {
  start(body, ceil_div(items, kThreads), 0);
}

template <typename... Pointers>
bool aligned_to(size_t bytes, const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

// The plane of items: [rows, columns] of packs of `pack` channels.
struct Grid {
  int64_t rows, columns;
  int64_t pack = 1;
};

template <typename Index>
Geometry<Index> geometry(const ReluPoolParams& p, Grid grid) {
  using Coord = typename Geometry<Index>::Coord;
  Geometry<Index> g{};
  for (int axis = 0; axis < 2; ++axis) {
    g.in[axis] = static_cast<Coord>(p.input_size[axis]);
    g.out[axis] = static_cast<Coord>(p.output_size[axis]);
    g.size[axis] = static_cast<Coord>(p.window.size[axis]);
    g.padding[axis] = static_cast<Coord>(p.window.padding[axis]);
    // A longer stride leaves no second window either.
    const int64_t stride = std::min(p.window.stride[axis], p.input_size[axis] + p.window.padding[axis]);
    g.stride[axis] = static_cast<Coord>(stride);
    g.by_stride[axis] = FastDivmod<Index>(static_cast<Index>(stride));
  }
  const int64_t groups = p.channels / grid.pack;
  g.channels = static_cast<Index>(p.channels);
  g.items = static_cast<Index>(p.batch * groups * grid.rows * grid.columns);
  g.by_grid[0] = FastDivmod<Index>(static_cast<Index>(grid.rows));
  g.by_grid[1] = FastDivmod<Index>(static_cast<Index>(grid.columns));
  g.by_group = FastDivmod<Index>(static_cast<Index>(groups));
  g.by_channels = FastDivmod<Index>(static_cast<Index>(p.channels));
  g.channels_last = p.channels_last;
  g.relu = p.activation == Activation::relu;
  g.wide_winner_mask = p.wide_winner_mask();
  return g;
}

inline bool is_2x2(const ReluPoolParams& p) {
  const auto& w = p.window;
  return w.size[0] == 2 && w.size[1] == 2 && w.stride[0] == 2 && w.stride[1] == 2 && w.padding[0] == 0 &&
         w.padding[1] == 0 && p.output_size[0] * 2 <= p.input_size[0] &&
         p.output_size[1] * 2 <= p.input_size[1];
}

inline bool is_even(const ReluPoolParams& p) {
  return p.input_size[0] % 2 == 0 && p.input_size[1] % 2 == 0;
}

// Rows of a contiguous problem cut into tiles that pass through shared memory.
struct Tiling {
  int64_t tiles_per_plane;
  int64_t rows_per_tile;
  int64_t planes_per_tile;
  int64_t blocks(int64_t planes) const { return tiles_per_plane * ceil_div(planes, planes_per_tile); }
};

constexpr int64_t kTileBytes = 12 << 10;    // a block's aim: four blocks share the smallest SM's memory
constexpr int64_t kManyBlocks = 256;        // no fewer blocks for the sake of larger ones
constexpr int64_t kSharedBytes = 48 << 10;  // what a block has without asking

// `staged(n)`: bytes that n written rows of one plane need staged; written_rows: of a whole plane.
template <typename Staged>
Tiling tile(int64_t planes, int64_t written_rows, Staged staged) {
  const int64_t plane = staged(written_rows);
  if (plane <= kTileBytes) {
    return {.tiles_per_plane = 1,
            .rows_per_tile = written_rows,
            .planes_per_tile = std::clamp<int64_t>(
                std::min(kTileBytes / std::max<int64_t>(plane, 1), planes / kManyBlocks), 1, planes)};
  }
  int64_t rows = 1;
  while (rows * 2 <= written_rows && staged(rows * 2) <= kTileBytes) rows *= 2;
  const int64_t tiles = ceil_div(written_rows, rows);
  rows = ceil_div(written_rows, tiles);
  return {.tiles_per_plane = ceil_div(written_rows, rows), .rows_per_tile = rows, .planes_per_tile = 1};
}

template <typename Index>
ChannelWalk<Index> channel_walk(const ReluPoolParams& p) {
  const int64_t inner = p.channels_last ? 1 : p.input_size[0] * p.input_size[1];
  return {.by_inner = FastDivmod<Index>(static_cast<Index>(inner)),
          .by_channels = FastDivmod<Index>(static_cast<Index>(p.channels)),
          .inner = static_cast<Index>(inner),
          .channels = static_cast<Index>(p.channels)};
}

// Whether packs of channels may read what comes before the activation in 16-byte accesses.
template <typename T>
bool in_packs(const AddBias<T>& before) {
  return aligned_to(16, before.bias);
}

// Whether a pack of consecutive elements may do so too.
template <typename T, typename Before>
bool walks_in_packs(const ReluPoolParams& p, const Before& before) {
  return p.channels_last && p.channels % kPackSize<T> == 0 && in_packs(before);
}

template <typename T, typename Index, typename Before, typename Start>
void forward_elementwise(const ReluPoolParams& p, const T* z, const Before& before, T* y, Start start) {
  const ForwardElementwise<T, Index, Before> body{.numel = static_cast<Index>(p.input_numel()),
                                                  .walk = channel_walk<Index>(p),
                                                  .aligned = aligned_to(16, z, y),
                                                  .in_packs = walks_in_packs<T>(p, before),
                                                  .relu = p.activation == Activation::relu,
                                                  .z = z,
                                                  .before = before,
                                                  .y = y};
  start_items(start, body, ceil_div(p.input_numel(), body.N));
}

template <typename T, typename Index, typename Before, typename Start>
void forward_mask(const ReluPoolParams& p, const T* z, const Before& before, void* winner_mask, Start start) {
  const ForwardMask<T, Index, Before> body{.numel = static_cast<Index>(p.input_numel()),
                                           .walk = channel_walk<Index>(p),
                                           .aligned = aligned_to(16, z),
                                           .in_packs = walks_in_packs<T>(p, before),
                                           .z = z,
                                           .before = before,
                                           .winner_mask = winner_mask};
  start_items(start, body, ceil_div(p.input_numel(), body.N));
}

template <int N, Pool kPool, typename Index, typename T, typename Before, typename Start>
void forward_gather(const ReluPoolParams& p, const T* z, const Before& before, T* y, void* winner_mask,
                    Start start) {
  const Grid grid{.rows = p.output_size[0], .columns = p.output_size[1], .pack = N};
  const ForwardGather<T, N, kPool, Index, Before> body{
      .g = geometry<Index>(p, grid), .z = z, .before = before, .y = y, .winner_mask = winner_mask};
  start_items(start, body, static_cast<int64_t>(body.g.items));
}

// Whether winner_masks of n neighbours go in one access.
inline bool winner_mask_in_packs(const ReluPoolParams& p, size_t n, const void* winner_mask) {
  return aligned_to(p.wide_winner_mask() ? 16 : n, winner_mask);
}

template <Pool kPool, typename T, typename Before, typename Start>
bool forward_staged(const ReluPoolParams& p, const T* z, const Before& before, T* y, void* winner_mask,
                    Start start) {
  const auto staged = [&](int64_t rows) {
    const int64_t z_rows = (rows - 1) * p.window.stride[0] + p.window.size[0];
    const int64_t all = p.input_size[0];
    return (rows == p.output_size[0] ? all : std::min(all, z_rows)) * p.input_size[1] *
           static_cast<int64_t>(sizeof(T));
  };
  const int64_t planes = p.batch * p.channels;
  const Tiling t = tile(planes, p.output_size[0], staged);
  const int64_t bytes = staged(t.rows_per_tile) * t.planes_per_tile + 32;  // both ends rounded to packs
  if (bytes > kSharedBytes) return false;
  const Grid grid{.rows = p.output_size[0], .columns = p.output_size[1]};
  const ForwardStaged<T, kPool, Before> body{.g = geometry<uint32_t>(p, grid),
                                             .planes = static_cast<uint32_t>(planes),
                                             .planes_per_tile = static_cast<uint32_t>(t.planes_per_tile),
                                             .tiles_per_plane = static_cast<uint32_t>(t.tiles_per_plane),
                                             .rows_per_tile = static_cast<uint32_t>(t.rows_per_tile),
                                             .z = z,
                                             .before = before,
                                             .y = y,
                                             .winner_mask = winner_mask};
  start(body, t.blocks(planes), bytes);
  return true;
}

template <Pool kPool, typename T, typename Before, typename Start>
void forward_pool(const ReluPoolParams& p, bool narrow, const T* z, const Before& before, T* y,
                  void* winner_mask, Start start) {
  constexpr int N = kPackSize<T>;
  const bool wants_mask =
      kPool == Pool::avg && Before::kHasMasks && p.activation == Activation::relu && winner_mask != nullptr;
  void* winner_masks = kPool == Pool::max ? winner_mask : nullptr;
  if (!narrow) {
    forward_gather<1, kPool, uint64_t>(p, z, before, y, winner_masks, start);
    if constexpr (Before::kHasMasks) {
      if (wants_mask) forward_mask<T, uint64_t>(p, z, before, winner_mask, start);
    }
    return;
  }
  bool mask_written = false;
  if (p.channels_last && p.channels % N == 0 && aligned_to(16, z, y) && in_packs(before) &&
      winner_mask_in_packs(p, N, winner_masks)) {
    if (is_2x2(p)) {
      mask_written = wants_mask && is_even(p) && p.channels % 8 == 0;
      const Grid grid{.rows = p.output_size[0], .columns = p.output_size[1], .pack = N};
      const ForwardChannels2x2<T, kPool, Before> body{
          .g = geometry<uint32_t>(p, grid),
          .z = z,
          .before = before,
          .y = y,
          .winner_mask = mask_written ? winner_mask : winner_masks};
      start_items(start, body, body.g.items);
    } else {
      forward_gather<N, kPool, uint32_t>(p, z, before, y, winner_masks, start);
    }
  } else if (!p.channels_last && is_2x2(p) && p.input_size[1] % N == 0 && aligned_to(16, z) &&
             aligned_to(8, y) && winner_mask_in_packs(p, N / 2, winner_masks)) {
    mask_written = wants_mask && is_even(p) && p.input_size[1] % 8 == 0;
    const Grid grid{.rows = p.output_size[0], .columns = p.input_size[1] / N};
    const ForwardRows2x2<T, kPool, Before> body{.g = geometry<uint32_t>(p, grid),
                                                .z = z,
                                                .before = before,
                                                .y = y,
                                                .winner_mask = mask_written ? winner_mask : winner_masks};
    start_items(start, body, body.g.items);
  } else if (p.channels_last || !forward_staged<kPool>(p, z, before, y, winner_masks, start)) {
    forward_gather<1, kPool, uint32_t>(p, z, before, y, winner_masks, start);
  }
  if constexpr (Before::kHasMasks) {
    if (wants_mask && !mask_written) forward_mask<T, uint32_t>(p, z, before, winner_mask, start);
  }
}

// Some images of a problem, and where they begin in its tensors.
struct Slice {
  ReluPoolParams p;
  bool narrow;
  int64_t z_offset;            // elements
  int64_t y_offset;            // elements
  int64_t winner_mask_offset;  // bytes

  template <typename T>
  T* winner_mask(T* whole) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
    return whole == nullptr ? nullptr : static_cast<Byte*>(whole) + winner_mask_offset;
  }
};

// Calls visit(slice) for groups of images that 32-bit indices reach, or for all with wide indices. Groups are
// multiples of 8 images: whole bytes of a mask, and the alignment of the first.
template <typename Visit>
void for_each_slice(const ReluPoolParams& p, Visit visit) {
  if (p.input_numel() == 0 || p.output_numel() == 0) return;
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(p.pool == Pool::none || p.window.size[axis] <= INT32_MAX / 4, "pool_size ",
                p.window.size[axis], " is too large for the CUDA kernels");
  }
  const int64_t image = std::max(p.input_numel(), p.output_numel()) / p.batch;
  const int64_t fitting = kNarrowIndexLimit / image;
  const bool narrow = p.batch <= fitting || fitting >= 8;
  const int64_t step = p.batch <= fitting || !narrow ? p.batch : fitting / 8 * 8;
  for (int64_t first = 0; first < p.batch; first += step) {
    Slice slice{.p = p,
                .narrow = narrow,
                .z_offset = first * (p.input_numel() / p.batch),
                .y_offset = first * (p.output_numel() / p.batch),
                .winner_mask_offset = 0};
    slice.p.batch = std::min(step, p.batch - first);
    slice.winner_mask_offset =
        p.pool == Pool::avg ? slice.z_offset / 8 : slice.y_offset * (p.wide_winner_mask() ? 4 : 1);
    visit(slice);
  }
}

// The whole pass.
template <typename T, typename Before, typename Start>
void forward_any(const ReluPoolParams& p, const T* z, const Before& before, T* y, void* winner_mask,
                 Start start) {
  for_each_slice(p, [&](const Slice& s) {
    const T* from = z + s.z_offset;
    T* to = y + s.y_offset;
    switch (p.pool) {
      case Pool::max:
        return forward_pool<Pool::max>(s.p, s.narrow, from, before, to, s.winner_mask(winner_mask), start);
      case Pool::avg:
        return forward_pool<Pool::avg>(s.p, s.narrow, from, before, to, s.winner_mask(winner_mask), start);
      case Pool::none:
        return s.narrow ? forward_elementwise<T, uint32_t>(s.p, from, before, to, start)
                        : forward_elementwise<T, uint64_t>(s.p, from, before, to, start);
    }
  });
}

// The problem, for the message of an error in any of its launches.
inline std::string described(const ReluPoolParams& p) {
  const PoolWindow& w = p.window;
  const char* pool = p.pool == Pool::max ? "max" : p.pool == Pool::avg ? "average" : "no";
  return c10::str("for a convolution output of shape [", p.batch, ", ", p.channels, ", ", p.input_size[0],
                  ", ", p.input_size[1], "]", p.channels_last ? ", channels_last" : "", ", with ", pool,
                  " pooling of size ", w.size[0], "x", w.size[1], ", stride ", w.stride[0], "x", w.stride[1],
                  ", padding ", w.padding[0], "x", w.padding[1]);
}

// Calls visit(T{}) for the type of `dtype`.
template <typename Visit>
void launch_for(const ReluPoolParams& p, Dtype dtype, Visit visit) {
  const auto launches = [&] {
    switch (dtype) {
      case Dtype::float32:
        return visit(float{});
      case Dtype::float64:
        return visit(double{});
      case Dtype::bfloat16:
        return visit(__nv_bfloat16{});
      case Dtype::float16:
        return visit(__half{});
    }
  };
  naming([&] { return described(p); }, launches);
}

}  // namespace dlfast
