// conv_forward(): launches of the kernels in kernel_channels.cuh and kernel_first.cuh.
#include <set>

#include <c10/util/Exception.h>

#include "conv/cuda/kernel_first.cuh"
#include "conv/cuda/launch_conv.cuh"

namespace dlfast {
namespace {

constexpr int kBlocksPerSm = 2;

// inspect: registers 128, dynamic 49152
// inspect from sm_80: holds STG.128, loop HMMA LDSM
// inspect from sm_80 for ConvChannels: loop LDGSTS.128
template <typename Body>
__global__ void __launch_bounds__(kConvThreads, kBlocksPerSm)
    conv_forward_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(128) unsigned char shared[];
  body.run({.block = blockIdx.x, .index = threadIdx.x}, shared);
}

struct FirstFit {
  Tiling tiling;
  FirstLayout layout;
  int64_t shared_bytes;
};

// How many accesses to the patch more than the least a step of ConvFirst makes, over all steps: what lanes of
// a warp ask for in one bank at once.
template <typename W>
int conflicts(const ConvTile& t, const FirstLayout& layout) {
  const auto word_of = [&](int k, int in_window) {
    const int tap = k >> layout.log_words, r = tap / t.kernel[1], s = tap % t.kernel[1];
    const int pixel =
        r * t.dilation[0] * t.row_pitch + t.column_at(in_window * t.stride[1] + s * t.dilation[1]);
    return pixel * layout.words() + (k & (layout.words() - 1));
  };
  const int window = W::width * t.stride[1] / t.planes * layout.words();
  int extra = 0;
  for (int first = 0; first < layout.steps * kStepWords; first += 4) {
    for (int in_window = 0; in_window < W::width; ++in_window) {
      std::set<int> words;
      for (int q = 0; q < 4; ++q) {
        if ((first + q) >> layout.log_words >= t.taps()) continue;
        const int word = word_of(first + q, in_window);
        for (int g = 0; g < kSlab; ++g) words.insert(word + g * window);
      }
      int in_bank[32] = {}, most = 1;
      for (const int word : words) most = std::max(most, ++in_bank[word % 32]);
      extra += most - 1;
    }
  }
  return extra;
}

// Interleaved or not, and how long rows are: what has the fewest bank conflicts.
template <typename W>
std::optional<FirstFit> search_first(const ConvView& v, int64_t element_bytes, int64_t channels_per_block,
                                     const CudaDevice& device) {
  const int64_t words = (v.in_channels * element_bytes + 3) / 4;
  std::optional<FirstFit> best;
  int best_conflicts = 0;
  for (const bool interleaved : {false, true}) {
    auto tiling = cut<W>(v, channels_per_block, interleaved);
    if (!tiling) return std::nullopt;
    ConvTile& t = tiling->tile;
    FirstLayout layout{};
    while (layout.words() < words) ++layout.log_words;
    const int64_t k = static_cast<int64_t>(t.taps()) * layout.words();
    if (k > 1024) return std::nullopt;
    layout.steps = static_cast<int32_t>((k + kStepWords - 1) / kStepWords);
    layout.weights_at = static_cast<int32_t>(round_up(layout.steps * kStepWords * W::width * 4, 128));
    layout.patch_at = static_cast<int32_t>(
        round_up(layout.weights_at + channels_per_block * layout.weight_pitch() * 4, 128));
    layout.by_filter = FastDivmod<uint32_t>(static_cast<uint32_t>(t.taps() * t.in_channels));
    layout.by_channels = FastDivmod<uint32_t>(static_cast<uint32_t>(t.in_channels));
    const int32_t shortest = t.row_pitch;
    for (t.row_pitch = shortest; t.row_pitch < shortest + 32; ++t.row_pitch) {
      const int64_t bytes =
          round_up(layout.patch_at + static_cast<int64_t>(t.patch_pixels()) * layout.words() * 4, 16);
      if (bytes > device.shared_bytes - 1024) break;
      const int found = conflicts<W>(t, layout);
      if (best && found >= best_conflicts) continue;
      layout.end = static_cast<int32_t>(bytes);
      best = FirstFit{*tiling, layout, bytes};
      best_conflicts = found;
      if (found == 0) return best;
    }
  }
  return best;
}

template <typename W>
std::optional<FirstFit> fit_first(const CudaConv& c, int64_t channels_per_block, const CudaDevice& device) {
  static Memo<std::optional<FirstFit>> memo;
  return memo.get(memo_key(c, device), [&] {
    return search_first<W>(forward_view(c.p), bytes_of(c.dtype), channels_per_block, device);
  });
}

constexpr int kWide = 8, kNarrow = 4;  // fragments of 8 channels that a block computes

int columns_for(int64_t out_channels) {
  return out_channels > 8 * kNarrow ? kWide : kNarrow;
}

template <typename W>
constexpr bool kTakesFirst = W::positions % 2 == 0;

template <typename W>
bool goes_first(const ConvView& v) {
  return kTakesFirst<W> && v.in_channels <= kFewChannels;
}

// 5 fragments of rows leave no registers for more.
template <typename W>
int columns_of(const ConvView& v) {
  return W::fragments > 2 ? kNarrow : columns_for(v.out_channels);
}

template <typename W>
std::optional<ConvWork> work_of(const CudaConv& c, const CudaDevice& device) {
  const ConvView v = forward_view(c.p);
  const int64_t columns = columns_of<W>(v);
  if (goes_first<W>(v)) {
    if (const auto fit = fit_first<W>(c, 8 * columns, device)) {
      return ConvWork{
          fit->tiling.blocks,
          block_macs<W>(columns) * static_cast<double>(fit->layout.steps * kStepBytes / bytes_of(c.dtype))};
    }
  }
  return channels_work<W>(v, columns, c, device);
}

template <typename T>
struct Tensors {
  const CudaConv& conv;
  const T* input;
  const T* weight;
  ConvFinish<T> finish;
  void* stream;
};

template <typename T, typename W, int kColumns>
void run_channels(const ConvView& v, const Tensors<T>& tensors, const CudaDevice& device) {
  using Body = ConvChannels<W, TensorSource<SameSink<T>>, kColumns>;
  const auto fit = fit_channels<W>(v, sizeof(T), Body::kChannels, device);
  TORCH_CHECK(fit, "conv_forward was asked for a problem that it does not take");
  const bool whole = v.in_channels % kPackSize<T> == 0;
  launch_conv<conv_forward_kernel<Body>>(
      Body{.t = fit->tiling.tile,
           .layout = fit->layout,
           .source = {.input = tensors.input, .in_packs = whole && aligned_16(tensors.input)},
           .weight = tensors.weight,
           .weight_in_packs = whole && aligned_16(tensors.weight),
           .finish = tensors.finish},
      fit->tiling.blocks, fit->shared_bytes, tensors.stream);
}

template <typename T, typename W, int kColumns>
void run(const ConvView& v, const Tensors<T>& tensors, const CudaDevice& device) {
  if constexpr (kTakesFirst<W>) {
    using Body = ConvFirst<T, W, kColumns>;
    if (goes_first<W>(v)) {
      if (const auto fit = fit_first<W>(tensors.conv, Body::kChannels, device)) {
        launch_conv<conv_forward_kernel<Body>>(Body{.t = fit->tiling.tile,
                                                    .layout = fit->layout,
                                                    .input = tensors.input,
                                                    .weight = tensors.weight,
                                                    .finish = tensors.finish},
                                               fit->tiling.blocks, fit->shared_bytes, tensors.stream);
        return;
      }
    }
  }
  run_channels<T, W, kColumns>(v, tensors, device);
}

}  // namespace

int64_t code_architecture() {
  cudaFuncAttributes facts{};
  using Any = ConvFirst<__half, Window2x2, kNarrow>;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&facts, reinterpret_cast<const void*>(conv_forward_kernel<Any>)));
  return facts.ptxVersion;
}

std::optional<ConvWork> conv_forward_work(const CudaConv& c, const CudaDevice& device) {
  if (c.math_mode == MathMode::fma) return conv_forward_fma_work(c, device);
  if (!acceptable(c, MathMode::tensor_core)) return std::nullopt;
  std::optional<ConvWork> work;
  with_window(c.p.pool, [&](auto window) { work = work_of<decltype(window)>(c, device); });
  return work;
}

void conv_forward(const CudaConv& c, const void* input, const void* weight, const void* bias, void* y,
                  void* winner_mask, void* stream) {
  if (c.math_mode == MathMode::fma) return conv_forward_fma(c, input, weight, bias, y, winner_mask, stream);
  with_narrow_type(c.dtype, [&](auto zero) {
    using T = decltype(zero);
    const CudaDevice& device = current_cuda_device();
    const ConvView v = forward_view(c.p);
    const Tensors<T> tensors{.conv = c,
                             .input = static_cast<const T*>(input),
                             .weight = static_cast<const T*>(weight),
                             .finish = forward_finish<T>(c, bias, y, winner_mask),
                             .stream = stream};
    with_window(c.p.pool, [&](auto window) {
      using W = decltype(window);
      if constexpr (W::fragments <= 2) {
        if (columns_of<W>(v) == kWide) return run<T, W, kWide>(v, tensors, device);
      }
      run<T, W, kNarrow>(v, tensors, device);
    });
  });
}

}  // namespace dlfast
