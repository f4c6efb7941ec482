// norm_cuda(): the passes of a normalisation that write tensors. Its sums are in launch_sums.cu.
#include <cstddef>

#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "core/launch.cuh"
#include "norm/cuda/kernel_norm.cuh"
#include "norm/cuda/launch_norm_sums.h"
#include "norm/kernels.h"
#include "pool/cuda/launch_relu_pool.cuh"

namespace dlfast {

template <typename T>
bool in_packs(const Affine<T>& before) {
  return aligned_to(16, before.scale, before.shift);
}

template <typename T>
bool in_packs(const NormGradient<T>& gradient) {
  return aligned_to(16, gradient.scale, gradient.mean, gradient.by_z, gradient.offset);
}

namespace {

// 80 registers a thread: the vectors of a pack of channels take more than the pass after a convolution has.
constexpr int kBlocksPerSm = 3;

// inspect: registers 80
// inspect for Staged: dynamic 49152, holds LDG.128
// inspect for Elementwise|ForwardRows2x2: holds LDG.128
// inspect for Elementwise|BackwardRows2x2: holds STG.128
// inspect for Channels2x2|Gather<\w+, [48],: holds LDG.128 STG.128
template <typename Body>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) norm_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(16) unsigned char shared[];
  body.run({.block = blockIdx.x, .index = threadIdx.x}, shared);
}

// How the bodies of these passes are started.
struct Start {
  void* stream;

  template <typename Body>
  void operator()(const Body& body, int64_t blocks, int64_t shared_bytes) const {
    launch("norm_kernel", norm_kernel<Body>, body,
           {.blocks = blocks, .threads = kThreads, .shared_bytes = shared_bytes, .stream = stream});
  }
};

template <typename T>
const Accumulator<T>* vector(const void* pointer) {
  return static_cast<const Accumulator<T>*>(pointer);
}

void forward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* scale, const void* shift,
             void* y, void* winner_mask, void* stream) {
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    forward_any(p, static_cast<const T*>(z), Affine<T>{.scale = vector<T>(scale), .shift = vector<T>(shift)},
                static_cast<T*>(y), p.pool == Pool::max ? winner_mask : nullptr, Start{stream});
  });
}

template <int N, typename Index, typename T>
void backward_gather(const ReluPoolParams& p, const T* grad_y, const void* winner_mask,
                     const NormGradient<T>& gradient, T* grad_z, Start start) {
  const Grid grid{.rows = p.input_size[0], .columns = p.input_size[1], .pack = N};
  const BackwardGather<T, N, Pool::max, Index, NormGradient<T>> body{.g = geometry<Index>(p, grid),
                                                                     .grad_y = grad_y,
                                                                     .winner_mask = winner_mask,
                                                                     .grad_z = grad_z,
                                                                     .finish = gradient};
  start_items(start, body, static_cast<int64_t>(body.g.items));
}

template <typename T>
void backward_max(const ReluPoolParams& p, bool narrow, const T* grad_y, const void* winner_mask,
                  const NormGradient<T>& gradient, T* grad_z, Start start) {
  constexpr int N = kPackSize<T>;
  if (!narrow) return backward_gather<1, uint64_t>(p, grad_y, winner_mask, gradient, grad_z, start);
  const bool aligned = aligned_to(16, gradient.z, grad_z);
  if (p.channels_last && p.channels % N == 0 && aligned && aligned_to(16, grad_y) && in_packs(gradient) &&
      winner_mask_in_packs(p, N, winner_mask)) {
    if (!is_2x2(p)) return backward_gather<N, uint32_t>(p, grad_y, winner_mask, gradient, grad_z, start);
    const Grid boxes{
        .rows = ceil_div(p.input_size[0], 2), .columns = ceil_div(p.input_size[1], 2), .pack = N};
    const BackwardChannels2x2<T, Pool::max, NormGradient<T>> body{.g = geometry<uint32_t>(p, boxes),
                                                                  .grad_y = grad_y,
                                                                  .winner_mask = winner_mask,
                                                                  .grad_z = grad_z,
                                                                  .finish = gradient};
    return start_items(start, body, body.g.items);
  }
  if (!p.channels_last && is_2x2(p) && p.input_size[1] % N == 0 && aligned && aligned_to(8, grad_y) &&
      winner_mask_in_packs(p, N / 2, winner_mask)) {
    const Grid grid{.rows = ceil_div(p.input_size[0], 2), .columns = p.input_size[1] / N};
    const BackwardRows2x2<T, Pool::max, NormGradient<T>> body{.g = geometry<uint32_t>(p, grid),
                                                              .grad_y = grad_y,
                                                              .winner_mask = winner_mask,
                                                              .grad_z = grad_z,
                                                              .finish = gradient};
    return start_items(start, body, body.g.items);
  }
  backward_gather<1, uint32_t>(p, grad_y, winner_mask, gradient, grad_z, start);
}

template <typename Index, typename T>
void backward_elementwise(const ReluPoolParams& p, const T* g, const Affine<T>& before,
                          const NormGradient<T>& gradient, T* grad_z, Start start) {
  const NormBackwardElementwise<T, Index> body{
      .numel = static_cast<Index>(p.input_numel()),
      .walk = channel_walk<Index>(p),
      .aligned = aligned_to(16, gradient.z, g, grad_z),
      .in_packs = walks_in_packs<T>(p, before) && walks_in_packs<T>(p, gradient),
      .relu = p.activation == Activation::relu,
      .before = before,
      .gradient = gradient,
      .g = g,
      .grad_z = grad_z};
  start_items(start, body, ceil_div(p.input_numel(), body.N));
}

void backward(const ReluPoolParams& p, Dtype dtype, const void* z, const void* grad_y,
              const void* winner_mask, const void* scale, const void* shift, const void* mean,
              const void* by_z, const void* offset, void* grad_z, void* stream) {
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    const Affine<T> before{.scale = vector<T>(scale), .shift = vector<T>(shift)};
    for_each_slice(p, [&](const Slice& s) {
      T* to = static_cast<T*>(grad_z) + s.z_offset;
      const NormGradient<T> gradient{.z = static_cast<const T*>(z) + s.z_offset,
                                     .scale = vector<T>(scale),
                                     .mean = vector<T>(mean),
                                     .by_z = vector<T>(by_z),
                                     .offset = vector<T>(offset)};
      const T* pooled = static_cast<const T*>(grad_y) + s.y_offset;
      if (p.pool == Pool::max) {
        return backward_max(s.p, s.narrow, pooled, s.winner_mask(winner_mask), gradient, to, Start{stream});
      }
      const T* g = p.pool == Pool::avg ? to : pooled;
      return s.narrow ? backward_elementwise<uint32_t>(s.p, g, before, gradient, to, Start{stream})
                      : backward_elementwise<uint64_t>(s.p, g, before, gradient, to, Start{stream});
    });
  });
}

}  // namespace

const NormKernels& norm_cuda() {
  static const NormKernels kernels{
      .moments = norm_moments_cuda, .forward = forward, .reduce = norm_reduce_cuda, .backward = backward};
  return kernels;
}

}  // namespace dlfast
