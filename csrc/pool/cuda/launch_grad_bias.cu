// grad_bias beside PyTorch's gradients on CUDA: launches of the kernels in kernel_channel_sums.cuh.
//
// A pass of its own rather than a part of the one that expands the gradient: that one is there in a dozen
// shapes, of which several see a pooled element more than once, while this reads each once, 3 bytes of it in
// a 16-bit type with pooling, where summing the dense gradient of 2x2 windows would read 8.
#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "core/launch.cuh"
#include "pool/cuda/launch_channel_sums.cuh"
#include "pool/kernels.h"

namespace dlfast {
namespace channel_sums {
namespace {

// 64 registers a thread. Left to itself, ptxas aims at more blocks for some bodies and spills a few bytes.
constexpr int kBlocksPerSm = 4;

// inspect: registers 64, dynamic 9216
// inspect for Over\w+<.*<(__\w+>, 8|float>, 4)>: holds LDG.128
template <typename Body>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    channel_sums_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(16) unsigned char shared[];
  body.run(blockIdx.x, static_cast<int32_t>(threadIdx.x), shared);
}

struct Start {
  void* stream;

  template <typename Body>
  void operator()(const Body& body, int64_t blocks) const {
    launch("channel_sums_kernel", channel_sums_kernel<Body>, body,
           {.blocks = blocks, .threads = kThreads, .shared_bytes = Body::kShared, .stream = stream});
  }
};

// What a sum is taken of: grad_y and winner mask, or with average pooling the dense gradient alone.
Extent extent_of(const ReluPoolParams& p) {
  return {p, p.pool == Pool::avg ? p.input_size : p.output_size, {.all = 1024, .most_splits = 512}};
}

WinnerMask what_mask_says(const ReluPoolParams& p) {
  return p.pool == Pool::max                ? (p.wide_winner_mask() ? WinnerMask::wide : WinnerMask::narrow)
         : p.pool == Pool::avg              ? WinnerMask::none
         : p.activation == Activation::relu ? WinnerMask::y
                                            : WinnerMask::none;
}

bool aligned_to(size_t bytes, const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename T>
void run(const ReluPoolParams& p, const void* grad, const void* winner_mask, void* workspace, void* grad_bias,
         void* stream) {
  constexpr int N = kPackSize<T>;
  const Extent s = extent_of(p);
  const Passing<T> elements{
      .kind = what_mask_says(p), .grad = static_cast<const T*>(grad), .winner_mask = winner_mask};
  const size_t winner_mask_bytes = elements.kind == WinnerMask::narrow ? N : 16;
  const Start start{stream};
  if (s.along() % N == 0 && aligned_to(16, grad) && aligned_to(winner_mask_bytes, winner_mask)) {
    walk<N>(s, elements, workspace, start);
  } else {
    walk<1>(s, elements, workspace, start);
  }
  const SumOfSplits<T> sum{.count = s.channels,
                           .second_count = 0,
                           .pitch = s.channels,
                           .splits = static_cast<int32_t>(s.splits()),
                           .partial = static_cast<const Accumulator<T>*>(workspace),
                           .result = static_cast<T*>(grad_bias),
                           .second = nullptr};
  start(sum, sum.blocks());
}

}  // namespace
}  // namespace channel_sums

int64_t grad_bias_workspace(const ReluPoolParams& p) {
  return channel_sums::extent_of(p).splits() * p.channels;
}

void grad_bias_cuda(const ReluPoolParams& p, Dtype dtype, const void* grad, const void* winner_mask,
                    void* workspace, void* grad_bias, void* stream) {
  switch (dtype) {
    case Dtype::float32:
      return channel_sums::run<float>(p, grad, winner_mask, workspace, grad_bias, stream);
    case Dtype::float64:
      return channel_sums::run<double>(p, grad, winner_mask, workspace, grad_bias, stream);
    case Dtype::bfloat16:
      return channel_sums::run<__nv_bfloat16>(p, grad, winner_mask, workspace, grad_bias, stream);
    case Dtype::float16:
      return channel_sums::run<__half>(p, grad, winner_mask, workspace, grad_bias, stream);
  }
}

}  // namespace dlfast
