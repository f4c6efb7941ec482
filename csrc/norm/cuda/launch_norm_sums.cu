// The sums per channel of a normalisation, see kernel_norm_sums.cuh, and what is computed of them.
#include <algorithm>
#include <cstddef>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "core/launch.cuh"
#include "norm/cuda/kernel_norm_sums.cuh"
#include "norm/cuda/launch_norm_sums.h"
#include "pool/cuda/launch_channel_sums.cuh"
#include "pool/cuda/launch_relu_pool.cuh"

namespace dlfast {
namespace norm_sums {
namespace {

// 80 registers a thread: a pack of channels has its vectors and two sums each.
constexpr int kBlocksPerSm = 3;

// inspect: registers 80, dynamic 17408
// inspect for Over\w+<.*<(__\w+|float)(, unsigned \w+)?>, [48]>: holds LDG.128
template <typename Body>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    norm_sums_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(16) unsigned char shared[];
  body.run(blockIdx.x, static_cast<int32_t>(threadIdx.x), shared);
}

struct Start {
  void* stream;

  template <typename Body>
  void operator()(const Body& body, int64_t blocks) const {
    launch("norm_sums_kernel", norm_sums_kernel<Body>, body,
           {.blocks = blocks, .threads = kThreads, .shared_bytes = Body::kShared, .stream = stream});
  }
};

// inspect: registers 32
template <typename Vectors>
__global__ void __launch_bounds__(kThreads) norm_vectors_kernel(const __grid_constant__ Vectors vectors) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel < vectors.channels) vectors.run(channel);
}

using channel_sums::Extent;

constexpr channel_sums::Blocks kBlocks{.all = 1536, .most_splits = 768};

Extent pooled_extent(const ReluPoolParams& p) {
  return {p, p.output_size, kBlocks};
}

Extent dense_extent(const ReluPoolParams& p) {
  return {p, p.input_size, kBlocks};
}

template <int N, typename Elements, typename Vectors>
void run(const Extent& s, const Elements& elements, double* workspace, const Vectors& vectors, double count,
         void* stream) {
  using Sum = Whole<Vectors, Elements::kMoments>;
  const Start start{stream};
  channel_sums::walk<N>(s, elements, workspace, start);
  start(Sum{.vectors = vectors,
            .splits = static_cast<int32_t>(s.splits()),
            .count = count,
            .partial = reinterpret_cast<const Partial*>(workspace)},
        ceil_div(s.channels, Sum::kChannels));
}

double count_of(const ReluPoolParams& p) {
  return static_cast<double>(p.batch) * static_cast<double>(p.input_size[0] * p.input_size[1]);
}

template <typename T, typename Index>
Winners<T, Index> winners(const ReluPoolParams& p, const T* z, const T* grad_y, const void* winner_mask,
                          const Accumulator<T>* mean) {
  const Grid grid{.rows = p.output_size[0], .columns = p.output_size[1]};
  const FastDivmod<uint32_t> by_width(static_cast<uint32_t>(p.window.size[1]));
  return {{{}, z, grad_y, mean}, geometry<Index>(p, grid), by_width, winner_mask};
}

}  // namespace
}  // namespace norm_sums

int64_t norm_partials_cuda(const ReluPoolParams& p) {
  using namespace norm_sums;
  const int64_t splits = std::max(pooled_extent(p).splits(), dense_extent(p).splits());
  return splits * p.channels * static_cast<int64_t>(sizeof(Partial) / sizeof(double));
}

void norm_moments_cuda(const ReluPoolParams& p, Dtype dtype, const void* z, double* partial,
                       const void* vectors_, void* stream) {
  using namespace norm_sums;
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kPackSize<T>;
    const Extent s = dense_extent(p);
    const Moments<T> elements{{}, static_cast<const T*>(z)};
    const auto& vectors = *static_cast<const TransformVectors<Accumulator<T>>*>(vectors_);
    if (s.along() % N == 0 && aligned_to(16, z)) {
      run<N>(s, elements, partial, vectors, count_of(p), stream);
    } else {
      run<1>(s, elements, partial, vectors, count_of(p), stream);
    }
  });
}

void norm_reduce_cuda(const ReluPoolParams& p, Dtype dtype, const void* z_, const void* grad_y,
                      const void* winner_mask, const void* scale_, const void* shift_, const void* mean_,
                      double* partial, const void* vectors_, void* grad_z, void* stream) {
  using namespace norm_sums;
  if (p.pool == Pool::avg) {
    ReluPoolParams undo = p;
    undo.activation = Activation::none;
    pool_cuda().backward(undo, dtype, grad_y, nullptr, grad_z, stream);
  }
  launch_for(p, dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = Accumulator<T>;
    constexpr int N = kPackSize<T>;
    const T* z = static_cast<const T*>(z_);
    const T* g = static_cast<const T*>(p.pool == Pool::avg ? grad_z : grad_y);
    const Acc* mean = static_cast<const Acc*>(mean_);
    const auto& vectors = *static_cast<const GradientVectors<Acc>*>(vectors_);
    const double count = count_of(p);
    if (p.pool == Pool::max) {
      const Extent s = pooled_extent(p);
      const bool narrow = std::max(p.input_numel(), p.output_numel()) <= kNarrowIndexLimit;
      if (!narrow) {
        run<1>(s, winners<T, uint64_t>(p, z, g, winner_mask, mean), partial, vectors, count, stream);
      } else if (s.along() % N == 0 && aligned_to(16, g, mean) && winner_mask_in_packs(p, N, winner_mask)) {
        run<N>(s, winners<T, uint32_t>(p, z, g, winner_mask, mean), partial, vectors, count, stream);
      } else {
        run<1>(s, winners<T, uint32_t>(p, z, g, winner_mask, mean), partial, vectors, count, stream);
      }
      return;
    }
    const Extent s = dense_extent(p);
    const Acc *scale = static_cast<const Acc*>(scale_), *shift = static_cast<const Acc*>(shift_);
    const Dense<T> elements{{{}, z, g, mean}, {scale, shift}, p.activation == Activation::relu};
    if (s.along() % N == 0 && aligned_to(16, z, g, mean, scale, shift)) {
      run<N>(s, elements, partial, vectors, count, stream);
    } else {
      run<1>(s, elements, partial, vectors, count, stream);
    }
  });
}

template <typename Vectors>
void norm_vectors_cuda(const Vectors& vectors, void* stream) {
  using namespace norm_sums;
  launch("norm_vectors_kernel", norm_vectors_kernel<Vectors>, vectors,
         {.blocks = ceil_div(vectors.channels, kThreads),
          .threads = kThreads,
          .shared_bytes = 0,
          .stream = stream});
}

template void norm_vectors_cuda(const TransformVectors<float>&, void*);
template void norm_vectors_cuda(const TransformVectors<double>&, void*);

}  // namespace dlfast
