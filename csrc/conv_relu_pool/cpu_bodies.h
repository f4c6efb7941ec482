// The CPU kernels of one SIMD level as a table. Included once per level, with DLFAST_LEVEL (a name) and
// DLFAST_LANES (floats in a register) defined.
#include "common/vec.h"
#include "conv_relu_pool/cpu_window.h"
// clang-format off: in the order they build on each other.
#include "conv_relu_pool/cpu_copy.h"
#include "conv_relu_pool/cpu_band.h"
#include "conv_relu_pool/cpu_channels_last.h"
#include "conv_relu_pool/cpu_strip.h"
#include "conv_relu_pool/cpu_direct_forward.h"
#include "conv_relu_pool/cpu_winograd.h"
#include "conv_relu_pool/cpu_forward.h"
#include "conv_relu_pool/cpu_depthwise.h"
#include "conv_relu_pool/cpu_depthwise_backward.h"
#include "conv_relu_pool/cpu_passing.h"
#include "conv_relu_pool/cpu_grad_input.h"
#include "conv_relu_pool/cpu_grad_weight.h"
#include "conv_relu_pool/cpu_grad_weight_channels.h"
#include "conv_relu_pool/cpu_grad_weight_rows.h"
#include "conv_relu_pool/cpu_grad_weight_masked.h"
#include "conv_relu_pool/cpu_winograd_grad_weight.h"
#include "conv_relu_pool/cpu_planes.h"
#include "conv_relu_pool/cpu_relu_pool.h"
#include "conv_relu_pool/cpu_peak.h"
#include "bn_relu_pool/cpu_norm.h"
// clang-format on

namespace dlfast {

#define DLFAST_CONCAT_(a, b) a##b
#define DLFAST_CONCAT(a, b) DLFAST_CONCAT_(a, b)

const CpuKernels& DLFAST_CONCAT(cpu_kernels_, DLFAST_LEVEL)() {
  namespace level = DLFAST_LEVEL;
  static const CpuKernels table = {
      .relu_pool = {.forward = level::relu_pool_forward,
                    .backward = level::relu_pool_backward,
                    .transpose = level::relu_pool_transpose},
      .norm = {.moments = level::norm_moments,
               .forward = level::norm_forward,
               .reduce = level::norm_reduce,
               .backward = level::norm_backward},
      .forward = level::forward,
      .forward_scratch = level::forward_scratch,
      .grad_weight = level::grad_weight,
      .grad_weight_scratch = level::grad_weight_scratch,
      .most_row_taps = level::kMaxTaps,
      .weight_bands = level::weight_bands,
      .weight_tiles = level::weight_tiles,
      .weight_sources = level::weight_sources,
      .weight_sources_scratch = level::weight_sources_scratch,
      .weight_from_sums = level::weight_from_sums,
      .grad_input = level::grad_input,
      .grad_input_scratch = level::grad_input_scratch,
      .depthwise_forward = level::depthwise_forward,
      .depthwise_grad_input = level::depthwise_grad_input,
      .depthwise_grad_weight = level::depthwise_grad_weight,
      .depthwise_scratch = level::depthwise_scratch,
      .depthwise_grad_weight_scratch = level::depthwise_grad_weight_scratch,
      .to_channels_last = level::to_channels_last,
      .codes_to_channels_last = level::codes_to_channels_last,
      .lanes = level::kLanes,
      .multiply_adds = level::multiply_adds,
  };
  return table;
}

}  // namespace dlfast
