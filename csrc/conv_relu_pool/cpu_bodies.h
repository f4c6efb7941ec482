// The CPU kernels of one SIMD level as a table. Included once per level, with DLFAST_LEVEL (a name) and
// DLFAST_LANES (floats in a register) defined.
#include "common/vec.h"
#include "conv_relu_pool/cpu_window.h"
// In the order they build on each other.
#include "conv_relu_pool/cpu_band.h"
#include "conv_relu_pool/cpu_direct_backward.h"
#include "conv_relu_pool/cpu_direct_forward.h"
#include "conv_relu_pool/cpu_planes.h"
#include "conv_relu_pool/cpu_relu_pool.h"

namespace dlfast {

#define DLFAST_CONCAT_(a, b) a##b
#define DLFAST_CONCAT(a, b) DLFAST_CONCAT_(a, b)

const CpuKernels& DLFAST_CONCAT(cpu_kernels_, DLFAST_LEVEL)() {
  namespace level = DLFAST_LEVEL;
  static const CpuKernels table = {
      .relu_pool = {.forward = level::relu_pool_forward,
                    .backward = level::relu_pool_backward,
                    .transpose = level::relu_pool_transpose},
      .direct_forward = level::direct_forward,
      .direct_forward_scratch = level::direct_forward_scratch,
      .direct_grad_weight = level::direct_grad_weight,
      .direct_grad_weight_scratch = level::direct_grad_weight_scratch,
      .grad_weight_max_taps = level::kMaxTaps,
  };
  return table;
}

}  // namespace dlfast
