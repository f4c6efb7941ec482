// conv_grad_input(): the gradient of the input is a convolution of the gradient of the output, which
// kernel_channels.cuh computes with a source that expands the pooled gradient on the way.
#include <c10/util/Exception.h>

#include "conv/cuda/launch_conv.cuh"

namespace dlfast {
namespace {

constexpr int kBlocksPerSm = 2;
constexpr int kWide = 8, kNarrow = 4;  // fragments of 8 channels that a block computes

// inspect: registers 128, dynamic 49152
// inspect from sm_80: holds STG.128, loop HMMA LDSM LDGSTS.128
// inspect from sm_80 for Masked|Pooled: holds LDG.128
template <typename Body>
__global__ void __launch_bounds__(kConvThreads, kBlocksPerSm)
    conv_grad_input_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(128) unsigned char shared[];
  body.run({.block = blockIdx.x, .index = threadIdx.x}, shared);
}

int columns_for(const ConvView& v) {
  return v.out_channels > 8 * kNarrow ? kWide : kNarrow;
}

template <int kColumns, typename T, typename Source>
void run(const CudaConv& c, const Source& source, const T* turned, void* grad_input, void* stream) {
  using Body = ConvChannels<PlainWindow, Source, kColumns>;
  const CudaDevice& device = current_cuda_device();
  const auto fit = fit_channels<PlainWindow>(turned_view(c.p), sizeof(T), Body::kChannels, device);
  TORCH_CHECK(fit, "conv_grad_input was asked for a problem that it does not take");
  const Body body{.t = fit->tiling.tile,
                  .layout = fit->layout,
                  .source = source,
                  .weight = turned,
                  .weight_in_packs = c.p.conv.out_channels % kPackSize<T> == 0 && aligned_16(turned),
                  .finish = grad_input_finish<T>(c, grad_input)};
  launch_conv<conv_grad_input_kernel<Body>>(body, fit->tiling.blocks, fit->shared_bytes, stream);
}

}  // namespace

std::optional<ConvWork> conv_grad_input_work(const CudaConv& c, const CudaDevice& device) {
  if (c.math_mode == MathMode::fma) return conv_grad_input_fma_work(c, device);
  if (!acceptable(c, MathMode::tensor_core) || !turnable(c)) return std::nullopt;
  const ConvView v = turned_view(c.p);
  return channels_work<PlainWindow>(v, columns_for(v), c, device);
}

void conv_grad_input(const CudaConv& c, const void* turned, const void* grad_y, const void* winner_mask,
                     void* grad_input, void* stream) {
  if (c.math_mode == MathMode::fma)
    return conv_grad_input_fma(c, turned, grad_y, winner_mask, grad_input, stream);
  with_narrow_type(c.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto* w = static_cast<const T*>(turned);
    with_gradient_source<SameSink<T>>(c, static_cast<const T*>(grad_y), winner_mask, [&](const auto& source) {
      return columns_for(turned_view(c.p)) == kWide ? run<kWide>(c, source, w, grad_input, stream)
                                                    : run<kNarrow>(c, source, w, grad_input, stream);
    });
  });
}

}  // namespace dlfast
