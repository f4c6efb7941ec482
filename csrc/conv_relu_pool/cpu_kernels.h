// What the CPU offers to op.cpp: one table of kernels per SIMD level, chosen once.
//
// The direct kernels compute a convolution block without ever holding the convolution output: each thread
// works on a band of pooled rows of one image. They take float32 and groups == 1; see `direct_forward_fits`
// and `direct_grad_weight_fits`.
#pragma once

#include <algorithm>

#include "common/simd.h"
#include "conv_relu_pool/params.h"
#include "conv_relu_pool/relu_pool.h"

namespace dlfast {

struct ConvBlockParams {
  ConvParams conv;
  ReluPoolParams pool;       // pool.input_size == conv.output_size
  int64_t input_strides[4];  // of the input [N, C, H, W], in elements; any layout
  int64_t grain;             // pooled rows a band has at most
};

struct CpuKernels {
  ReluPoolBackend relu_pool;

  // weight [K, C, kh, kw] contiguous, bias [K] or null, y and code as in relu_pool.h (code may be null).
  // scratch holds direct_forward_scratch(p, threads) floats.
  void (*direct_forward)(const ConvBlockParams& p, const float* input, const float* weight, const float* bias,
                         float* y, uint8_t* code, float* scratch);
  int64_t (*direct_forward_scratch)(const ConvBlockParams& p, int64_t threads);

  // grad_weight [K, C, kh, kw] contiguous and grad_bias [K] from a contiguous pooled gradient: only
  // the positions that pass gradient are visited. code is the uint8 code of max pooling, or y (float)
  // without pooling. False, and the result unusable, where the input holds an infinity or a NaN: those meet
  // the zeros that are skipped here, and PyTorch's product of the two is NaN.
  bool (*direct_grad_weight)(const ConvBlockParams& p, const float* input, const float* grad_y,
                             const void* code, float* grad_weight, float* grad_bias, float* scratch);
  int64_t (*direct_grad_weight_scratch)(const ConvBlockParams& p, int64_t threads);
  int64_t grad_weight_max_taps;  // kh * kw * C the kernel above accepts
};

const CpuKernels& cpu_kernels_portable();
#if DLFAST_X86
const CpuKernels& cpu_kernels_avx2();
const CpuKernels& cpu_kernels_avx512();
#endif

inline const CpuKernels& cpu_kernels() {
#if DLFAST_X86
  switch (simd_level()) {
    case SimdLevel::avx512:
      return cpu_kernels_avx512();
    case SimdLevel::avx2:
      return cpu_kernels_avx2();
    default:
      break;
  }
#endif
  return cpu_kernels_portable();
}

// Scratch per thread of a direct kernel stays below 16 MiB: what needs more, because a single band is that
// large, is left to PyTorch.
constexpr double kMostScratchFloats = 4.0 * 1024 * 1024;

// Columns of the padded input under a row of the convolution output. In floating point, since padding and
// dilation may be anything below 2^31.
inline double padded_columns(const ConvParams& conv) {
  return (conv.output_size[1] - 1.0) * conv.stride[1] + (conv.kernel[1] - 1.0) * conv.dilation[1] + 1.0;
}

// Whether a band of one pooled row fits, with `per_position` floats for each position of the convolution.
inline bool smallest_band_fits(const ConvBlockParams& p, double per_position) {
  const double conv_rows = std::min(p.pool.window.size[0], p.conv.output_size[0]);
  const double rows =
      (conv_rows - 1.0) * p.conv.stride[0] + (p.conv.kernel[0] - 1.0) * p.conv.dilation[0] + 1.0;
  return rows * padded_columns(p.conv) * p.conv.in_channels +
             conv_rows * p.conv.output_size[1] * per_position <=
         kMostScratchFloats;
}

// Whether the direct forward kernel accepts the problem: the bit mask of an average after ReLU and codes
// wider than a byte are left to the pass after PyTorch's convolution.
inline bool direct_forward_fits(const ConvBlockParams& p, bool save_code) {
  const bool mask_wanted = save_code && p.pool.pool == Pool::avg && p.pool.activation == Activation::relu;
  constexpr double kOutputsPerPosition = 64;  // a block of channels, and the tile it is pooled into
  return p.conv.groups == 1 && !mask_wanted && !p.pool.wide_code() &&
         smallest_band_fits(p, kOutputsPerPosition);
}

inline bool direct_grad_weight_fits(const ConvBlockParams& p, const CpuKernels& kernels) {
  return p.conv.groups == 1 && p.pool.pool != Pool::avg && !p.pool.wide_code() &&
         p.conv.kernel[0] * p.conv.kernel[1] * p.conv.in_channels <= kernels.grad_weight_max_taps &&
         smallest_band_fits(p, static_cast<double>(kernels.grad_weight_max_taps));
}

}  // namespace dlfast
