// pool_cuda(): chooses a body for each problem and launches it.
//
// A problem too large for 32-bit indices is cut into groups of images; only where a few images alone are too
// large do the plain bodies run with 64-bit indices.
#include <algorithm>

#include <c10/cuda/CUDAStream.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "core/launch.cuh"
#include "pool/cuda/kernel_relu_pool_backward.cuh"
#include "pool/cuda/launch_relu_pool.cuh"
#include "pool/kernels.h"

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

template <typename Body>
void launch_body(const Body& body, int64_t blocks, int64_t shared_bytes, void* stream) {
  launch("relu_pool_kernel", relu_pool_kernel<Body>, body,
         {.blocks = blocks, .threads = kThreads, .shared_bytes = shared_bytes, .stream = stream});
}

template <typename Body>
void launch_items(const Body& body, int64_t items, void* stream) {
  launch_body(body, ceil_div(items, kThreads), 0, stream);
}

template <typename T, int N, Pool kPool, typename Index>
void backward_gather(const ReluPoolParams& p, const T* grad_y, const void* winner_mask, T* grad_z,
                     void* stream) {
  const Grid grid{.rows = p.input_size[0], .columns = p.input_size[1], .pack = N};
  const BackwardGather<T, N, kPool, Index> body{.g = geometry<Index>(p, grid),
                                                .grad_y = grad_y,
                                                .winner_mask = winner_mask,
                                                .grad_z = grad_z,
                                                .finish = {}};
  launch_items(body, static_cast<int64_t>(body.g.items), stream);
}

template <typename T, Pool kPool>
bool backward_staged(const ReluPoolParams& p, const T* grad_y, const void* winner_mask, T* grad_z,
                     void* stream) {
  if (kPool == Pool::max && p.wide_winner_mask()) return false;
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
  const int64_t winner_mask_at = round_up(elements * static_cast<int64_t>(sizeof(T)) + 16, 16);
  const int64_t bytes = winner_mask_at + (kPool == Pool::max ? round_up(elements + 16, 16) : 0);
  if (bytes > kSharedBytes) return false;
  const Grid grid{.rows = p.input_size[0], .columns = p.input_size[1]};
  const BackwardStaged<T, kPool> body{.g = geometry<uint32_t>(p, grid),
                                      .planes = static_cast<uint32_t>(planes),
                                      .planes_per_tile = static_cast<uint32_t>(t.planes_per_tile),
                                      .tiles_per_plane = static_cast<uint32_t>(t.tiles_per_plane),
                                      .rows_per_tile = static_cast<uint32_t>(t.rows_per_tile),
                                      .winner_mask_at = static_cast<uint32_t>(winner_mask_at),
                                      .grad_y = grad_y,
                                      .winner_mask = winner_mask,
                                      .grad_z = grad_z};
  launch_body(body, t.blocks(planes), bytes, stream);
  return true;
}

template <typename T, Pool kPool>
void backward_pool(const ReluPoolParams& p, bool narrow, const T* grad_y, const void* winner_mask, T* grad_z,
                   void* stream) {
  constexpr int N = kPackSize<T>;
  if (!narrow) return backward_gather<T, 1, kPool, uint64_t>(p, grad_y, winner_mask, grad_z, stream);
  const bool winner_mask_aligned = kPool == Pool::avg || winner_mask_in_packs(p, N, winner_mask);
  if (p.channels_last && p.channels % N == 0 && aligned_to(16, grad_y, grad_z) && winner_mask_aligned) {
    if (!is_2x2(p)) return backward_gather<T, N, kPool, uint32_t>(p, grad_y, winner_mask, grad_z, stream);
    const Grid boxes{
        .rows = ceil_div(p.input_size[0], 2), .columns = ceil_div(p.input_size[1], 2), .pack = N};
    const BackwardChannels2x2<T, kPool> body{.g = geometry<uint32_t>(p, boxes),
                                             .grad_y = grad_y,
                                             .winner_mask = winner_mask,
                                             .grad_z = grad_z,
                                             .finish = {}};
    return launch_items(body, body.g.items, stream);
  }
  if (!p.channels_last && is_2x2(p) && p.input_size[1] % N == 0 && aligned_to(8, grad_y) &&
      aligned_to(16, grad_z) && (kPool == Pool::avg || winner_mask_in_packs(p, N / 2, winner_mask))) {
    const Grid grid{.rows = ceil_div(p.input_size[0], 2), .columns = p.input_size[1] / N};
    const BackwardRows2x2<T, kPool> body{.g = geometry<uint32_t>(p, grid),
                                         .grad_y = grad_y,
                                         .winner_mask = winner_mask,
                                         .grad_z = grad_z,
                                         .finish = {}};
    return launch_items(body, body.g.items, stream);
  }
  if (!p.channels_last && backward_staged<T, kPool>(p, grad_y, winner_mask, grad_z, stream)) return;
  backward_gather<T, 1, kPool, uint32_t>(p, grad_y, winner_mask, grad_z, stream);
}

template <typename T, Pool kPool, typename Index>
void transpose_gather(const ReluPoolParams& p, const T* grad_z, const void* winner_mask, T* grad_y,
                      void* stream) {
  const Grid grid{.rows = p.output_size[0], .columns = p.output_size[1]};
  const TransposeGather<T, kPool, Index> body{
      .g = geometry<Index>(p, grid), .grad_z = grad_z, .winner_mask = winner_mask, .grad_y = grad_y};
  launch_items(body, static_cast<int64_t>(body.g.items), stream);
}

template <typename T, Pool kPool>
void transpose_pool(const ReluPoolParams& p, bool narrow, const T* grad_z, const void* winner_mask, T* grad_y,
                    void* stream) {
  return narrow ? transpose_gather<T, kPool, uint32_t>(p, grad_z, winner_mask, grad_y, stream)
                : transpose_gather<T, kPool, uint64_t>(p, grad_z, winner_mask, grad_y, stream);
}

template <typename T>
void backward_elementwise(const ReluPoolParams& p, const T* from, const void* y, T* to, void* stream) {
  const T* winner_mask = p.activation == Activation::relu ? static_cast<const T*>(y) : nullptr;
  const BackwardElementwise<T> body{.numel = static_cast<uint64_t>(p.input_numel()),
                                    .aligned = aligned_to(16, from, winner_mask, to),
                                    .from = from,
                                    .winner_mask = winner_mask,
                                    .to = to};
  launch_items(body, ceil_div(p.input_numel(), body.N), stream);
}

void forward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* bias, void* y,
             void* winner_mask, void* stream) {
  const auto start = [stream](const auto& body, int64_t blocks, int64_t shared_bytes) {
    launch_body(body, blocks, shared_bytes, stream);
  };
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    forward_any(p, static_cast<const T*>(z), AddBias<T>{static_cast<const T*>(bias)}, static_cast<T*>(y),
                winner_mask, start);
  });
}

void backward(const ReluPoolParams& p, Dtype dtype, const void* grad_y, const void* winner_mask, void* grad_z,
              void* stream) {
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(grad_y);
    T* to = static_cast<T*>(grad_z);
    if (p.pool == Pool::none) {
      if (p.input_numel() > 0) backward_elementwise<T>(p, from, winner_mask, to, stream);
      return;
    }
    for_each_slice(p, [&](const Slice& s) {
      return p.pool == Pool::max
                 ? backward_pool<T, Pool::max>(s.p, s.narrow, from + s.y_offset, s.winner_mask(winner_mask),
                                               to + s.z_offset, stream)
                 : backward_pool<T, Pool::avg>(s.p, s.narrow, from + s.y_offset, s.winner_mask(winner_mask),
                                               to + s.z_offset, stream);
    });
  });
}

void transpose(const ReluPoolParams& p, Dtype dtype, const void* grad_z, const void* winner_mask,
               void* grad_y, void* stream) {
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(grad_z);
    T* to = static_cast<T*>(grad_y);
    if (p.pool == Pool::none) {
      if (p.input_numel() > 0) backward_elementwise<T>(p, from, winner_mask, to, stream);
      return;
    }
    for_each_slice(p, [&](const Slice& s) {
      return p.pool == Pool::max
                 ? transpose_pool<T, Pool::max>(s.p, s.narrow, from + s.z_offset, s.winner_mask(winner_mask),
                                                to + s.y_offset, stream)
                 : transpose_pool<T, Pool::avg>(s.p, s.narrow, from + s.z_offset, s.winner_mask(winner_mask),
                                                to + s.y_offset, stream);
    });
  });
}

}  // namespace

const PoolKernels& pool_cuda() {
  static const PoolKernels backend{.forward = forward, .backward = backward, .transpose = transpose};
  return backend;
}

}  // namespace dlfast
