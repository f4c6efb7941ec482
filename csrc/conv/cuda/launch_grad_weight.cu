// conv_grad_weight(): launches of the kernels in kernel_grad_weight.cuh.
#include "conv/cuda/launch_grad_weight.h"

#include <array>
#include <mutex>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "conv/cuda/kernel_grad_weight.cuh"
#include "core/launch.cuh"
#include "pool/cuda/kernel_channel_sums.cuh"

namespace dlfast {
namespace grad_weight {
namespace {

using channel_sums::SumOfSplits;

template <typename Body>
constexpr int kBlocksPerSm = 1;
template <typename Products>
constexpr int kBlocksPerSm<PartialSums<Products>> = 2;  // as far as registers go; shared memory may allow one
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
// For these architectures ptxas takes a few registers more, and spills where two blocks must fit.
template <>
constexpr int kBlocksPerSm<PartialSums<TensorSlots<__half>>> = 1;
template <>
constexpr int kBlocksPerSm<PartialSums<TensorSlots<__nv_bfloat16>>> = 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <>
constexpr int kBlocksPerSm<PartialSums<TensorSlots<float>>> = 1;
#endif

// inspect: registers 128
// inspect for PartialSums: dynamic 81920, holds LDG.128 STS.128
// inspect from sm_80 for SlotsLoader|TensorSlots: holds LDGSTS.128
// inspect from sm_90 for TensorSlots: registers 192
// inspect from sm_80 for Tensor\w+<__: loop HMMA LDSM
// inspect from sm_80 for Tensor\w+<float: loop HMMA LDS
// inspect for Fma: loop FFMA LDS.128
template <typename Body>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Body>)
    conv_grad_weight_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(128) unsigned char shared[];  // banks are chosen by the last bits of addresses
  body.run(blockIdx.x, static_cast<int32_t>(threadIdx.x), shared);
}

// Lets blocks of this body have all shared memory of the device; asked for once per device.
template <typename Body>
void allow_shared_memory() {
  static std::array<std::once_flag, C10_COMPILE_TIME_MAX_GPUS> asked;
  std::call_once(asked[static_cast<size_t>(c10::cuda::current_device())], [] {
    C10_CUDA_CHECK(cudaFuncSetAttribute(conv_grad_weight_kernel<Body>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(current_cuda_device().shared_bytes)));
  });
}

template <typename Body>
void launch_body(const Body& body, int64_t blocks, int64_t shared_bytes, void* stream) {
  launch("conv_grad_weight_kernel", conv_grad_weight_kernel<Body>, body,
         {.blocks = blocks, .threads = kThreads, .shared_bytes = shared_bytes, .stream = stream});
}

// As op.cpp hands it over.
struct Call {
  Tiling tiling;
  const void* input;
  const void* grad_y;
  const void* winner_mask;
  void* grad_weight;
  void* grad_bias;
  float* workspace;
  void* stream;
};

bool aligned_to(size_t bytes, const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename Products>
void run(const Call& call) {
  using T = typename Products::T;
  constexpr int N = kPackSize<T>;
  PartialSums<Products> body{.p = call.tiling.p,
                             .input = static_cast<const T*>(call.input),
                             .grad_y = static_cast<const T*>(call.grad_y),
                             .winner_mask = call.winner_mask,
                             .partial = call.workspace};
  Params& p = body.p;
  const size_t winner_mask_bytes = p.passing == Passing::winners ? N : 16;
  p.packs_of_outputs =
      p.outputs % N == 0 && aligned_to(16, call.grad_y) && aligned_to(winner_mask_bytes, call.winner_mask);
  p.packs_of_channels = p.channels % N == 0 && aligned_to(16, call.input);
  allow_shared_memory<PartialSums<Products>>();
  launch_body(body, call.tiling.blocks(), call.tiling.shared_bytes, call.stream);

  const SumOfSplits<T> sum{.count = p.columns() * p.outputs,
                           .second_count = call.grad_bias == nullptr ? 0 : p.outputs,
                           .pitch = call.tiling.split_pitch(),
                           .splits = p.splits,
                           .partial = call.workspace,
                           .result = static_cast<T*>(call.grad_weight),
                           .second = static_cast<T*>(call.grad_bias)};
  launch_body(sum, sum.blocks(), kThreads * static_cast<int64_t>(sizeof(float)), call.stream);
}

template <typename T>
void run_kind(const Call& call) {
  switch (call.tiling.kind) {
    case Kind::tensor_slots:
      return run<TensorSlots<T>>(call);
    case Kind::tensor_planes:
      return run<TensorPlanes<T, 4>>(call);
    case Kind::tensor_planes_narrow:
      return run<TensorPlanes<T, 2>>(call);
    case Kind::fma_slots:
      return run<Fma<T, SlotsLoader<T>>>(call);
    case Kind::fma_planes:
      return run<Fma<T, PlanesLoader<T>>>(call);
  }
}

}  // namespace
}  // namespace grad_weight

bool conv_grad_weight_fits(const CudaConv& c, const CudaDevice& device) {
  return c.p.pool.channels_last && grad_weight::tiling_of(c, device).has_value();
}

int64_t conv_grad_weight_workspace(const CudaConv& c, const CudaDevice& device) {
  const auto tiling = grad_weight::tiling_of(c, device);
  return tiling ? tiling->p.splits * tiling->split_pitch() : 0;
}

void conv_grad_weight(const CudaConv& c, const void* input, const void* grad_y, const void* winner_mask,
                      void* grad_weight, void* grad_bias, float* workspace, void* stream) {
  const auto tiling = grad_weight::tiling_of(c, current_cuda_device());
  TORCH_CHECK(tiling, "conv_grad_weight was asked for a problem that it does not take");
  const grad_weight::Call call{.tiling = *tiling,
                               .input = input,
                               .grad_y = grad_y,
                               .winner_mask = winner_mask,
                               .grad_weight = grad_weight,
                               .grad_bias = grad_bias,
                               .workspace = workspace,
                               .stream = stream};
  switch (c.dtype) {
    case Dtype::float32:
      return grad_weight::run_kind<float>(call);
    case Dtype::float16:
      return grad_weight::run_kind<__half>(call);
    case Dtype::bfloat16:
      return grad_weight::run_kind<__nv_bfloat16>(call);
    case Dtype::float64:
      break;  // not taken
  }
}

}  // namespace dlfast
