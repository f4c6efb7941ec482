// conv_forward_fma() and conv_grad_input_fma(): launches of the kernel in kernel_fma.cuh.
#include <c10/util/Exception.h>

#include "conv/cuda/kernel_fma.cuh"
#include "conv/cuda/launch_conv.cuh"

namespace dlfast {
namespace {

constexpr int kColumns = 4;  // fragments of 8 channels that a block computes

// inspect: registers 96, dynamic 31744, holds STG.128
// inspect for Window<3, 3: registers 168
// inspect for WideSink<float>: holds LDG.128
template <typename Body>
__global__ void __launch_bounds__(kConvThreads, Body::kBlocksPerSm)
    conv_fma_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(128) unsigned char shared[];
  body.run({.block = blockIdx.x, .index = threadIdx.x}, shared);
}

struct FmaFit {
  Tiling tiling;
  FmaLayout layout;
  int64_t shared_bytes;
};

template <typename W>
std::optional<FmaFit> fit_fma(const ConvView& v, const CudaDevice& device) {
  const auto tiling = cut<W>(v, 8 * kColumns, true);
  if (!tiling) return std::nullopt;
  const ConvTile& t = tiling->tile;
  constexpr int64_t kMostTaps = 4;
  for (const int64_t blocks : {2, 1}) {
    for (int64_t asked = std::min<int64_t>(t.taps(), kMostTaps); asked >= 1; --asked) {
      const int64_t stages = (t.taps() + asked - 1) / asked, per_stage = (t.taps() + stages - 1) / stages;
      const int64_t weights_at = round_up(static_cast<int64_t>(t.taps()) * W::width * 4, 128);
      const int64_t patch_at = weights_at + per_stage * 8 * kColumns * kChunkBytes;
      const int64_t bytes = patch_at + static_cast<int64_t>(t.patch_pixels()) * kChunkBytes;
      if (bytes > device.shared_bytes / blocks - 1024) continue;
      return FmaFit{*tiling,
                    {.taps_per_stage = static_cast<int32_t>(per_stage),
                     .weights_at = static_cast<int32_t>(weights_at),
                     .patch_at = static_cast<int32_t>(patch_at)},
                    bytes};
    }
  }
  return std::nullopt;
}

template <typename W>
std::optional<ConvWork> work_of(const ConvView& v, const CudaDevice& device) {
  const auto fit = fit_fma<W>(v, device);
  if (!fit) return std::nullopt;
  const double k = static_cast<double>(v.kernel[0] * v.kernel[1] * v.in_channels);
  return ConvWork{fit->tiling.blocks, block_macs<W>(kColumns) * k};
}

template <typename W, typename Source, typename T>
void run(const ConvView& v, const Source& source, const T* weight, const ConvFinish<T>& finish,
         void* stream) {
  using Body = ConvFma<W, Source, kColumns>;
  const CudaDevice& device = current_cuda_device();
  const auto fit = fit_fma<W>(v, device);
  TORCH_CHECK(fit, "conv_fma was asked for a problem that it does not take");
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % (4 * sizeof(T)) == 0;
  const Body body{.t = fit->tiling.tile,
                  .layout = fit->layout,
                  .source = source,
                  .weight = weight,
                  .weight_in_packs = v.in_channels % 4 == 0 && aligned,
                  .finish = finish};
  launch_conv<conv_fma_kernel<Body>>(body, fit->tiling.blocks, fit->shared_bytes, stream);
}

}  // namespace

std::optional<ConvWork> conv_forward_fma_work(const CudaConv& c, const CudaDevice& device) {
  if (!acceptable(c, MathMode::fma)) return std::nullopt;
  std::optional<ConvWork> work;
  with_window(c.p.pool, [&](auto window) { work = work_of<decltype(window)>(forward_view(c.p), device); });
  return work;
}

void conv_forward_fma(const CudaConv& c, const void* input, const void* weight, const void* bias, void* y,
                      void* winner_mask, void* stream) {
  with_narrow_type(c.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sink = WideSink<T>;
    const auto* x = static_cast<const T*>(input);
    const bool aligned = reinterpret_cast<uintptr_t>(x) % (Sink::N * sizeof(T)) == 0;
    const TensorSource<Sink> source{.input = x, .in_packs = c.p.conv.in_channels % Sink::N == 0 && aligned};
    with_window(c.p.pool, [&](auto window) {
      run<decltype(window)>(forward_view(c.p), source, static_cast<const T*>(weight),
                            forward_finish<T>(c, bias, y, winner_mask), stream);
    });
  });
}

std::optional<ConvWork> conv_grad_input_fma_work(const CudaConv& c, const CudaDevice& device) {
  if (!acceptable(c, MathMode::fma) || !turnable(c)) return std::nullopt;
  return work_of<PlainWindow>(turned_view(c.p), device);
}

void conv_grad_input_fma(const CudaConv& c, const void* turned, const void* grad_y, const void* winner_mask,
                         void* grad_input, void* stream) {
  with_narrow_type(c.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_gradient_source<WideSink<T>>(c, static_cast<const T*>(grad_y), winner_mask, [&](const auto& source) {
      run<PlainWindow>(turned_view(c.p), source, static_cast<const T*>(turned),
                       grad_input_finish<T>(c, grad_input), stream);
    });
  });
}

}  // namespace dlfast
