// relu_pool_cuda(): chooses a body for each problem and launches it.
//
// A problem too large for 32-bit indices is cut into groups of images; only where a few images alone are too
// large do the plain bodies run with 64-bit indices.
#include <algorithm>
#include <cstddef>
#include <string>

#include <c10/cuda/CUDAStream.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "common/launch_check.h"
#include "conv_relu_pool/kernel_relu_pool_backward.cuh"
#include "conv_relu_pool/kernel_relu_pool_forward.cuh"
#include "conv_relu_pool/relu_pool.h"

namespace dlfast {
namespace {

// 64 registers a thread. Left to itself, ptxas aims at more blocks for some bodies and spills a few bytes.
constexpr int kBlocksPerSm = 4;

// inspect: registers 64
// inspect for Staged: dynamic 49152, holds LDG.128
// inspect for BackwardStaged: holds STG.128
// inspect for Elementwise|Mask|ForwardRows2x2: holds LDG.128
// inspect for Elementwise|BackwardRows2x2: holds STG.128
// inspect for Channels2x2|Gather<\w+, [48],: holds LDG.128 STG.128
template <typename Body>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    relu_pool_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(16) unsigned char shared[];
  body.run({.block = blockIdx.x, .index = threadIdx.x}, shared);
}

struct Launch {
  int64_t blocks;
  int64_t shared_bytes;
  void* stream;
};

template <typename Body>
void launch(const Body& body, Launch how) {
  relu_pool_kernel<<<static_cast<unsigned>(how.blocks), kThreads, static_cast<size_t>(how.shared_bytes),
                     static_cast<cudaStream_t>(how.stream)>>>(body);
  check_launch([&] {
    return c10::str("in relu_pool_kernel<", c10::demangle_type<Body>(), ">, ", how.blocks, " blocks of ",
                    kThreads, " threads with ", how.shared_bytes, " bytes of shared memory");
  });
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename Body>
void launch_items(const Body& body, int64_t items, void* stream) {
  launch(body, {.blocks = ceil_div(items, kThreads), .shared_bytes = 0, .stream = stream});
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
    g.by_stride[axis] = Divider<Index>(static_cast<Index>(stride));
  }
  const int64_t groups = p.channels / grid.pack;
  g.channels = static_cast<Index>(p.channels);
  g.items = static_cast<Index>(p.batch * groups * grid.rows * grid.columns);
  g.by_grid[0] = Divider<Index>(static_cast<Index>(grid.rows));
  g.by_grid[1] = Divider<Index>(static_cast<Index>(grid.columns));
  g.by_group = Divider<Index>(static_cast<Index>(groups));
  g.by_channels = Divider<Index>(static_cast<Index>(p.channels));
  g.channels_last = p.channels_last;
  g.relu = p.activation == Activation::relu;
  g.wide_code = p.wide_code();
  return g;
}

bool is_2x2(const ReluPoolParams& p) {
  const auto& w = p.window;
  return w.size[0] == 2 && w.size[1] == 2 && w.stride[0] == 2 && w.stride[1] == 2 && w.padding[0] == 0 &&
         w.padding[1] == 0 && p.output_size[0] * 2 <= p.input_size[0] &&
         p.output_size[1] * 2 <= p.input_size[1];
}

bool is_even(const ReluPoolParams& p) {
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

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

template <typename Index>
ChannelWalk<Index> channel_walk(const ReluPoolParams& p) {
  const int64_t inner = p.channels_last ? 1 : p.input_size[0] * p.input_size[1];
  return {.by_inner = Divider<Index>(static_cast<Index>(inner)),
          .by_channels = Divider<Index>(static_cast<Index>(p.channels)),
          .inner = static_cast<Index>(inner),
          .channels = static_cast<Index>(p.channels)};
}

// Whether a pack of channels may take its biases in one access.
template <typename T>
bool bias_in_packs(const ReluPoolParams& p, const T* bias) {
  return bias == nullptr || (p.channels_last && p.channels % kPackSize<T> == 0 && aligned_to(16, bias));
}

template <typename T, typename Index>
void forward_elementwise(const ReluPoolParams& p, const T* z, const T* bias, T* y, void* stream) {
  const ForwardElementwise<T, Index> body{.numel = static_cast<Index>(p.input_numel()),
                                          .walk = channel_walk<Index>(p),
                                          .aligned = aligned_to(16, z, y),
                                          .bias_aligned = bias_in_packs(p, bias),
                                          .relu = p.activation == Activation::relu,
                                          .z = z,
                                          .bias = bias,
                                          .y = y};
  launch_items(body, ceil_div(p.input_numel(), body.N), stream);
}

template <typename T, typename Index>
void forward_mask(const ReluPoolParams& p, const T* z, const T* bias, void* code, void* stream) {
  const ForwardMask<T, Index> body{.numel = static_cast<Index>(p.input_numel()),
                                   .walk = channel_walk<Index>(p),
                                   .aligned = aligned_to(16, z),
                                   .bias_aligned = bias_in_packs(p, bias),
                                   .z = z,
                                   .bias = bias,
                                   .code = code};
  launch_items(body, ceil_div(p.input_numel(), body.N), stream);
}

template <typename T, int N, Pool kPool, typename Index>
void forward_gather(const ReluPoolParams& p, const T* z, const T* bias, T* y, void* code, void* stream) {
  const Grid grid{.rows = p.output_size[0], .columns = p.output_size[1], .pack = N};
  const ForwardGather<T, N, kPool, Index> body{
      .g = geometry<Index>(p, grid), .z = z, .bias = bias, .y = y, .code = code};
  launch_items(body, static_cast<int64_t>(body.g.items), stream);
}

// Whether codes of n neighbours go in one access.
bool codes_in_packs(const ReluPoolParams& p, size_t n, const void* code) {
  return aligned_to(p.wide_code() ? 16 : n, code);
}

template <typename T, Pool kPool>
bool forward_staged(const ReluPoolParams& p, const T* z, const T* bias, T* y, void* code, void* stream) {
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
  const ForwardStaged<T, kPool> body{.g = geometry<uint32_t>(p, grid),
                                     .planes = static_cast<uint32_t>(planes),
                                     .planes_per_tile = static_cast<uint32_t>(t.planes_per_tile),
                                     .tiles_per_plane = static_cast<uint32_t>(t.tiles_per_plane),
                                     .rows_per_tile = static_cast<uint32_t>(t.rows_per_tile),
                                     .z = z,
                                     .bias = bias,
                                     .y = y,
                                     .code = code};
  launch(body, {.blocks = t.blocks(planes), .shared_bytes = bytes, .stream = stream});
  return true;
}

template <typename T, Pool kPool>
void forward_pool(const ReluPoolParams& p, bool narrow, const T* z, const T* bias, T* y, void* code,
                  void* stream) {
  constexpr int N = kPackSize<T>;
  const bool wants_mask = kPool == Pool::avg && p.activation == Activation::relu && code != nullptr;
  void* codes = kPool == Pool::max ? code : nullptr;
  if (!narrow) {
    forward_gather<T, 1, kPool, uint64_t>(p, z, bias, y, codes, stream);
    if (wants_mask) forward_mask<T, uint64_t>(p, z, bias, code, stream);
    return;
  }
  bool mask_written = false;
  if (p.channels_last && p.channels % N == 0 && aligned_to(16, z, bias, y) && codes_in_packs(p, N, codes)) {
    if (is_2x2(p)) {
      mask_written = wants_mask && is_even(p) && p.channels % 8 == 0;
      const Grid grid{.rows = p.output_size[0], .columns = p.output_size[1], .pack = N};
      const ForwardChannels2x2<T, kPool> body{.g = geometry<uint32_t>(p, grid),
                                              .z = z,
                                              .bias = bias,
                                              .y = y,
                                              .code = mask_written ? code : codes};
      launch_items(body, body.g.items, stream);
    } else {
      forward_gather<T, N, kPool, uint32_t>(p, z, bias, y, codes, stream);
    }
  } else if (!p.channels_last && is_2x2(p) && p.input_size[1] % N == 0 && aligned_to(16, z) &&
             aligned_to(8, y) && codes_in_packs(p, N / 2, codes)) {
    mask_written = wants_mask && is_even(p) && p.input_size[1] % 8 == 0;
    const Grid grid{.rows = p.output_size[0], .columns = p.input_size[1] / N};
    const ForwardRows2x2<T, kPool> body{
        .g = geometry<uint32_t>(p, grid), .z = z, .bias = bias, .y = y, .code = mask_written ? code : codes};
    launch_items(body, body.g.items, stream);
  } else if (p.channels_last || !forward_staged<T, kPool>(p, z, bias, y, codes, stream)) {
    forward_gather<T, 1, kPool, uint32_t>(p, z, bias, y, codes, stream);
  }
  if (wants_mask && !mask_written) forward_mask<T, uint32_t>(p, z, bias, code, stream);
}

template <typename T, int N, Pool kPool, typename Index>
void backward_gather(const ReluPoolParams& p, const T* grad_y, const void* code, T* grad_z, void* stream) {
  const Grid grid{.rows = p.input_size[0], .columns = p.input_size[1], .pack = N};
  const BackwardGather<T, N, kPool, Index> body{
      .g = geometry<Index>(p, grid), .grad_y = grad_y, .code = code, .grad_z = grad_z};
  launch_items(body, static_cast<int64_t>(body.g.items), stream);
}

template <typename T, Pool kPool>
bool backward_staged(const ReluPoolParams& p, const T* grad_y, const void* code, T* grad_z, void* stream) {
  if (kPool == Pool::max && p.wide_code()) return false;
  const auto y_rows = [&](int64_t rows) {
    const int64_t covering = (rows + p.window.size[0] - 2) / p.window.stride[0] + 1;
    const int64_t all = p.output_size[0];
    return (rows == p.input_size[0] ? all : std::min(all, covering)) * p.output_size[1];
  };
  const auto staged = [&](int64_t rows) {
    return y_rows(rows) * static_cast<int64_t>(kPool == Pool::max ? sizeof(T) + 1 : sizeof(T));
  };
  const int64_t planes = p.batch * p.channels;
  // Few bytes are staged for many written: the tile is measured by what it writes where that is more.
  const Tiling t = tile(planes, p.input_size[0], [&](int64_t rows) {
    return std::max(staged(rows), rows * p.input_size[1] * static_cast<int64_t>(sizeof(T)));
  });
  const int64_t elements = y_rows(t.rows_per_tile) * t.planes_per_tile;
  const int64_t codes_at = round_up(elements * static_cast<int64_t>(sizeof(T)) + 16, 16);
  const int64_t bytes = codes_at + (kPool == Pool::max ? round_up(elements + 16, 16) : 0);
  if (bytes > kSharedBytes) return false;
  const Grid grid{.rows = p.input_size[0], .columns = p.input_size[1]};
  const BackwardStaged<T, kPool> body{.g = geometry<uint32_t>(p, grid),
                                      .planes = static_cast<uint32_t>(planes),
                                      .planes_per_tile = static_cast<uint32_t>(t.planes_per_tile),
                                      .tiles_per_plane = static_cast<uint32_t>(t.tiles_per_plane),
                                      .rows_per_tile = static_cast<uint32_t>(t.rows_per_tile),
                                      .codes_at = static_cast<uint32_t>(codes_at),
                                      .grad_y = grad_y,
                                      .code = code,
                                      .grad_z = grad_z};
  launch(body, {.blocks = t.blocks(planes), .shared_bytes = bytes, .stream = stream});
  return true;
}

template <typename T, Pool kPool>
void backward_pool(const ReluPoolParams& p, bool narrow, const T* grad_y, const void* code, T* grad_z,
                   void* stream) {
  constexpr int N = kPackSize<T>;
  if (!narrow) return backward_gather<T, 1, kPool, uint64_t>(p, grad_y, code, grad_z, stream);
  const bool code_aligned = kPool == Pool::avg || codes_in_packs(p, N, code);
  if (p.channels_last && p.channels % N == 0 && aligned_to(16, grad_y, grad_z) && code_aligned) {
    if (!is_2x2(p)) return backward_gather<T, N, kPool, uint32_t>(p, grad_y, code, grad_z, stream);
    const Grid boxes{
        .rows = ceil_div(p.input_size[0], 2), .columns = ceil_div(p.input_size[1], 2), .pack = N};
    const BackwardChannels2x2<T, kPool> body{
        .g = geometry<uint32_t>(p, boxes), .grad_y = grad_y, .code = code, .grad_z = grad_z};
    return launch_items(body, body.g.items, stream);
  }
  if (!p.channels_last && is_2x2(p) && p.input_size[1] % N == 0 && aligned_to(8, grad_y) &&
      aligned_to(16, grad_z) && (kPool == Pool::avg || codes_in_packs(p, N / 2, code))) {
    const Grid grid{.rows = ceil_div(p.input_size[0], 2), .columns = p.input_size[1] / N};
    const BackwardRows2x2<T, kPool> body{
        .g = geometry<uint32_t>(p, grid), .grad_y = grad_y, .code = code, .grad_z = grad_z};
    return launch_items(body, body.g.items, stream);
  }
  if (!p.channels_last && backward_staged<T, kPool>(p, grad_y, code, grad_z, stream)) return;
  backward_gather<T, 1, kPool, uint32_t>(p, grad_y, code, grad_z, stream);
}

template <typename T, Pool kPool, typename Index>
void transpose_gather(const ReluPoolParams& p, const T* grad_z, const void* code, T* grad_y, void* stream) {
  const Grid grid{.rows = p.output_size[0], .columns = p.output_size[1]};
  const TransposeGather<T, kPool, Index> body{
      .g = geometry<Index>(p, grid), .grad_z = grad_z, .code = code, .grad_y = grad_y};
  launch_items(body, static_cast<int64_t>(body.g.items), stream);
}

template <typename T, Pool kPool>
void transpose_pool(const ReluPoolParams& p, bool narrow, const T* grad_z, const void* code, T* grad_y,
                    void* stream) {
  return narrow ? transpose_gather<T, kPool, uint32_t>(p, grad_z, code, grad_y, stream)
                : transpose_gather<T, kPool, uint64_t>(p, grad_z, code, grad_y, stream);
}

template <typename T>
void backward_elementwise(const ReluPoolParams& p, const T* from, const void* y, T* to, void* stream) {
  const T* code = p.activation == Activation::relu ? static_cast<const T*>(y) : nullptr;
  const BackwardElementwise<T> body{.numel = static_cast<uint64_t>(p.input_numel()),
                                    .aligned = aligned_to(16, from, code, to),
                                    .from = from,
                                    .code = code,
                                    .to = to};
  launch_items(body, ceil_div(p.input_numel(), body.N), stream);
}

// Some images of a problem, and where they begin in its tensors.
struct Slice {
  ReluPoolParams p;
  bool narrow;
  int64_t z_offset;     // elements
  int64_t y_offset;     // elements
  int64_t code_offset;  // bytes

  template <typename T>
  T* code(T* whole) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
    return whole == nullptr ? nullptr : static_cast<Byte*>(whole) + code_offset;
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
                .code_offset = 0};
    slice.p.batch = std::min(step, p.batch - first);
    slice.code_offset = p.pool == Pool::avg ? slice.z_offset / 8 : slice.y_offset * (p.wide_code() ? 4 : 1);
    visit(slice);
  }
}

// The problem, for the message of an error in any of its launches.
std::string described(const ReluPoolParams& p) {
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

void forward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* bias, void* y, void* code,
             void* stream) {
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_slice(p, [&](const Slice& s) {
      const T* from = static_cast<const T*>(z) + s.z_offset;
      const T* b = static_cast<const T*>(bias);
      T* to = static_cast<T*>(y) + s.y_offset;
      switch (p.pool) {
        case Pool::max:
          return forward_pool<T, Pool::max>(s.p, s.narrow, from, b, to, s.code(code), stream);
        case Pool::avg:
          return forward_pool<T, Pool::avg>(s.p, s.narrow, from, b, to, s.code(code), stream);
        case Pool::none:
          return s.narrow ? forward_elementwise<T, uint32_t>(s.p, from, b, to, stream)
                          : forward_elementwise<T, uint64_t>(s.p, from, b, to, stream);
      }
    });
  });
}

void backward(const ReluPoolParams& p, Dtype dtype, const void* grad_y, const void* code, void* grad_z,
              void* stream) {
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(grad_y);
    T* to = static_cast<T*>(grad_z);
    if (p.pool == Pool::none) {
      if (p.input_numel() > 0) backward_elementwise<T>(p, from, code, to, stream);
      return;
    }
    for_each_slice(p, [&](const Slice& s) {
      return p.pool == Pool::max ? backward_pool<T, Pool::max>(s.p, s.narrow, from + s.y_offset, s.code(code),
                                                               to + s.z_offset, stream)
                                 : backward_pool<T, Pool::avg>(s.p, s.narrow, from + s.y_offset, s.code(code),
                                                               to + s.z_offset, stream);
    });
  });
}

void transpose(const ReluPoolParams& p, Dtype dtype, const void* grad_z, const void* code, void* grad_y,
               void* stream) {
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(grad_z);
    T* to = static_cast<T*>(grad_y);
    if (p.pool == Pool::none) {
      if (p.input_numel() > 0) backward_elementwise<T>(p, from, code, to, stream);
      return;
    }
    for_each_slice(p, [&](const Slice& s) {
      return p.pool == Pool::max ? transpose_pool<T, Pool::max>(s.p, s.narrow, from + s.z_offset,
                                                                s.code(code), to + s.y_offset, stream)
                                 : transpose_pool<T, Pool::avg>(s.p, s.narrow, from + s.z_offset,
                                                                s.code(code), to + s.y_offset, stream);
    });
  });
}

}  // namespace

const ReluPoolBackend& relu_pool_cuda() {
  static const ReluPoolBackend backend{.forward = forward, .backward = backward, .transpose = transpose};
  return backend;
}

}  // namespace dlfast
