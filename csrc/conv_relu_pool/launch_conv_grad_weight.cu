// conv_grad_weight(): launches of the kernels in kernel_conv_grad_weight.cuh.
#include "conv_relu_pool/conv_cuda.h"

#include <c10/util/Exception.h>

namespace dlfast {

bool conv_grad_weight_fits(const CudaConv& /*c*/, const CudaDevice& /*device*/) {
  return false;
}

int64_t conv_grad_weight_scratch(const CudaConv& /*c*/, const CudaDevice& /*device*/) {
  return 0;
}

void conv_grad_weight(const CudaConv& /*c*/, const void* /*input*/, const void* /*grad_y*/,
                      const void* /*code*/, void* /*grad_weight*/, void* /*grad_bias*/, float* /*scratch*/,
                      void* /*stream*/) {
  TORCH_CHECK(false, "conv_grad_weight was asked for a problem that it does not take");
}

}  // namespace dlfast
