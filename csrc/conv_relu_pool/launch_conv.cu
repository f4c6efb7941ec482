// conv_forward() and conv_grad_input(): launches of the kernels in kernel_conv_forward.cuh.
#include "conv_relu_pool/conv_cuda.h"

#include <array>
#include <mutex>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>
#include <cuda_runtime.h>

namespace dlfast {

const CudaDevice& current_cuda_device() {
  constexpr int kMostDevices = 64;
  static std::array<CudaDevice, kMostDevices> devices;
  static std::array<std::once_flag, kMostDevices> asked;
  const int index = c10::cuda::current_device();
  TORCH_CHECK(index < kMostDevices, "dlfast knows at most ", kMostDevices, " CUDA devices, got device ",
              index);
  std::call_once(asked[index], [index] {
    const auto attribute = [index](cudaDeviceAttr which) {
      int value = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
      return static_cast<int64_t>(value);
    };
    devices[index] = {.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                              attribute(cudaDevAttrComputeCapabilityMinor),
                      .processors = attribute(cudaDevAttrMultiProcessorCount),
                      .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return devices[index];
}

bool conv_forward_fits(const CudaConv& /*c*/, const CudaDevice& /*device*/) {
  return false;
}

void conv_forward(const CudaConv& /*c*/, const void* /*input*/, const void* /*weight*/, const void* /*bias*/,
                  void* /*y*/, void* /*code*/, void* /*stream*/) {
  TORCH_CHECK(false, "conv_forward was asked for a problem that it does not take");
}

bool conv_grad_input_fits(const CudaConv& /*c*/, const CudaDevice& /*device*/) {
  return false;
}

void conv_grad_input(const CudaConv& /*c*/, const void* /*turned*/, const void* /*grad_y*/,
                     const void* /*code*/, void* /*grad_input*/, void* /*stream*/) {
  TORCH_CHECK(false, "conv_grad_input was asked for a problem that it does not take");
}

}  // namespace dlfast
