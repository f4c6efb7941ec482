// What the launches of the single kernels share: cutting a convolution into tiles, choosing what shared
// memory holds, and launching.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <optional>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "conv/cuda/kernel_channels.cuh"
#include "conv/cuda/kernels.h"
#include "core/launch.cuh"
#include "core/math.h"

namespace dlfast {

constexpr int64_t kMost32Bit = int64_t{1} << 30;  // of what is counted in int32_t, products of two included
constexpr int64_t kFewChannels = 4;               // of first layers

inline bool aligned_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A convolution as a kernel sees it, which for the gradient of the input is another one than the block's.
struct ConvView {
  int64_t batch;
  int64_t in[2], in_channels, out[2], out_channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t windows[2];  // pooled output; ignored without pooling
};

inline ConvView forward_view(const ConvBlockParams& p) {
  ConvView v{.batch = p.conv.batch, .in_channels = p.conv.in_channels, .out_channels = p.conv.out_channels};
  for (const int axis : {0, 1}) {
    v.in[axis] = p.conv.input_size[axis];
    v.out[axis] = p.conv.output_size[axis];
    v.kernel[axis] = p.conv.kernel[axis];
    v.stride[axis] = p.conv.stride[axis];
    v.padding[axis] = p.conv.padding[axis];
    v.dilation[axis] = p.conv.dilation[axis];
    v.windows[axis] = p.pool.output_size[axis];
  }
  return v;
}

// The convolution that turns the gradient of the output into that of the input; for stride 1.
inline ConvView turned_view(const ConvBlockParams& p) {
  ConvView v{.batch = p.conv.batch, .in_channels = p.conv.out_channels, .out_channels = p.conv.in_channels};
  for (const int axis : {0, 1}) {
    v.in[axis] = p.conv.output_size[axis];
    v.out[axis] = p.conv.input_size[axis];
    v.kernel[axis] = p.conv.kernel[axis];
    v.stride[axis] = 1;
    v.padding[axis] = p.conv.dilation[axis] * (p.conv.kernel[axis] - 1) - p.conv.padding[axis];
    v.dilation[axis] = p.conv.dilation[axis];
  }
  return v;
}

// Side of disjoint square max-pooling windows, 1 without pooling, 0 for everything else.
inline int64_t window_side(const ReluPoolParams& p) {
  if (p.pool == Pool::none) return 1;
  const auto& w = p.window;
  const bool plain = w.size[0] == w.size[1] && w.stride[0] == w.size[0] && w.stride[1] == w.size[1] &&
                     w.padding[0] == 0 && w.padding[1] == 0;
  return p.pool == Pool::max && plain && w.size[0] <= 3 && w.size[0] >= 2 ? w.size[0] : 0;
}

// A tiling and the blocks it takes.
struct Tiling {
  ConvTile tile;
  int64_t blocks;
};

// Chooses the shape of a tile: as few tiles as possible, then as little halo. With `interleaved` the patch
// has a plane for every column of a window's step, else one. Nothing where the numbers outgrow 32 bits.
template <typename W>
std::optional<Tiling> cut(const ConvView& v, int64_t channels_per_block, bool interleaved) {
  const int64_t windows[2] = {W::pooled ? v.windows[0] : (v.out[0] + W::height - 1) / W::height,
                              W::pooled ? v.windows[1] : v.out[1]};
  const auto tiles_of = [&](int axis, int64_t size) { return (windows[axis] + size - 1) / size; };
  const auto patch_of = [&](int axis, int64_t tile) {
    const int64_t side = axis == 0 ? W::height : W::width;
    return (tile * side - 1) * v.stride[axis] + (v.kernel[axis] - 1) * v.dilation[axis] + 1;
  };
  int64_t best[2] = {0, 0};
  double best_cost = 0;
  for (int64_t columns = kSlab; columns <= kSlab * kConvWarps; columns *= 2) {
    const int64_t rows = kSlab * kConvWarps / columns;
    const double tiles = static_cast<double>(tiles_of(0, rows)) * static_cast<double>(tiles_of(1, columns));
    const double cost =
        tiles * (kSlab * kConvWarps * W::positions +
                 static_cast<double>(patch_of(0, rows)) * static_cast<double>(patch_of(1, columns)));
    if (best[0] != 0 && cost >= best_cost) continue;
    best[0] = rows;
    best[1] = columns;
    best_cost = cost;
  }
  ConvTile t{};
  const auto small = [](int64_t n) { return static_cast<int32_t>(std::min(n, kMost32Bit)); };
  for (const int axis : {0, 1}) {
    t.in[axis] = small(v.in[axis]);
    t.out[axis] = small(v.out[axis]);
    t.kernel[axis] = small(v.kernel[axis]);
    t.stride[axis] = small(v.stride[axis]);
    t.padding[axis] = small(v.padding[axis]);
    t.dilation[axis] = small(v.dilation[axis]);
    t.windows[axis] = small(windows[axis]);
    t.tile[axis] = small(best[axis]);
    t.patch[axis] = small(patch_of(axis, best[axis]));
  }
  t.in_channels = small(v.in_channels);
  t.out_channels = small(v.out_channels);
  const int64_t step = W::width * v.stride[1];
  t.planes = small(interleaved ? step : 1);
  t.plane = (t.patch[1] + t.planes - 1) / t.planes;
  t.row_pitch = t.plane * t.planes;
  const int64_t channel_tiles = (v.out_channels + channels_per_block - 1) / channels_per_block;
  const int64_t blocks = v.batch * tiles_of(0, best[0]) * tiles_of(1, best[1]) * channel_tiles;
  const int64_t image_in = v.in[0] * v.in[1] * v.in_channels, image_out = v.out[0] * v.out[1];
  constexpr int64_t kMostPatch = 1 << 20;  // far more than shared memory holds
  if (blocks > kMost32Bit || image_in > kMost32Bit || image_out > kMost32Bit || v.out_channels > kMost32Bit ||
      patch_of(0, best[0]) > kMostPatch || patch_of(1, best[1]) > kMostPatch ||
      int64_t{t.patch[0]} * t.row_pitch > kMostPatch || v.padding[0] > kMostPatch ||
      v.padding[1] > kMostPatch || v.kernel[0] * v.kernel[1] > kMostPatch) {
    return std::nullopt;
  }
  t.by_planes = FastDivmod<uint32_t>(static_cast<uint32_t>(t.planes));
  t.by_patch_columns = FastDivmod<uint32_t>(static_cast<uint32_t>(t.patch[1]));
  t.by_channel_tiles = FastDivmod<uint32_t>(static_cast<uint32_t>(channel_tiles));
  t.by_tile_columns = FastDivmod<uint32_t>(static_cast<uint32_t>(tiles_of(1, best[1])));
  t.by_tile_rows = FastDivmod<uint32_t>(static_cast<uint32_t>(tiles_of(0, best[0])));
  return Tiling{t, blocks};
}

struct ChannelsFit {
  Tiling tiling;
  ChannelsLayout layout;
  int64_t shared_bytes;
};

// For ConvChannels: as many taps in a stage as leave room for a second block beside this one, else as many as
// go.
template <typename W>
std::optional<ChannelsFit> fit_channels(const ConvView& v, int64_t element_bytes, int64_t channels_per_block,
                                        const CudaDevice& device) {
  const auto tiling = cut<W>(v, channels_per_block, true);
  if (!tiling) return std::nullopt;
  const ConvTile& t = tiling->tile;
  const int64_t chunks = (v.in_channels * element_bytes + kChunkBytes - 1) / kChunkBytes;
  const int64_t taps = t.taps();
  constexpr int64_t kMostTaps = 4;
  for (const int64_t blocks : {2, 1}) {
    const int64_t limit = device.shared_bytes / blocks - 1024;  // what the system keeps of it
    for (int64_t asked = std::min(taps, kMostTaps); asked >= 1; --asked) {
      const int64_t stages = (taps + asked - 1) / asked, per_stage = (taps + stages - 1) / stages;
      const int64_t patches = std::min<int64_t>(chunks, stages == 1 ? kStages : 2);
      const int64_t weights_at = round_up(taps * W::width * 4, 128);
      const int64_t patches_at = weights_at + kStages * per_stage * channels_per_block * kChunkBytes;
      const int64_t patch_bytes = static_cast<int64_t>(t.patch_pixels()) * kChunkBytes;
      const int64_t bytes = patches_at + patches * patch_bytes;
      if (bytes > limit) continue;
      return ChannelsFit{*tiling,
                         {.taps_per_stage = static_cast<int32_t>(per_stage),
                          .stages_per_chunk = static_cast<int32_t>((taps + per_stage - 1) / per_stage),
                          .patches = static_cast<int32_t>(patches),
                          .patch_bytes = static_cast<int32_t>(patch_bytes),
                          .weights_at = static_cast<int32_t>(weights_at),
                          .patches_at = static_cast<int32_t>(patches_at)},
                         bytes};
    }
  }
  return std::nullopt;
}

// Launches a kernel of kConvThreads per block. More than 48 KiB of shared memory must be asked for, once for
// each kernel and device.
template <auto kKernel, typename Body>
void launch_conv(const Body& body, int64_t blocks, int64_t shared_bytes, void* stream) {
  static std::array<std::once_flag, 64> asked;
  std::call_once(asked[c10::cuda::current_device()], [] {
    C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(current_cuda_device().shared_bytes)));
  });
  launch("the kernel", kKernel, body,
         {.blocks = blocks, .threads = kConvThreads, .shared_bytes = shared_bytes, .stream = stream});
}

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

template <typename Visit>
void with_narrow_type(Dtype dtype, Visit visit) {
  switch (dtype) {
    case Dtype::float16:
      return visit(__half{});
    case Dtype::bfloat16:
      return visit(__nv_bfloat16{});
    default:
      return visit(float{});
  }
}

// Calls visit(window) for the pooling of a block.
template <typename Visit>
void with_window(const ReluPoolParams& p, Visit visit) {
  switch (window_side(p)) {
    case 2:
      return visit(Window2x2{});
    case 3:
      return visit(Window3x3{});
    default:
      return visit(PlainWindow{});
  }
}

// Calls visit(source) for the gradient of a block's convolution output; winner mask as in kernels.h.
template <typename Sink, typename Visit>
void with_gradient_source(const CudaConv& c, const typename Sink::T* grad_y, const void* winner_mask,
                          Visit visit) {
  using T = typename Sink::T;
  const auto aligned = [](const void* p, size_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
  };
  constexpr size_t kBytes = Sink::N * sizeof(T);
  const bool whole = c.p.conv.out_channels % Sink::N == 0 && aligned(grad_y, kBytes);
  const int64_t side = window_side(c.p.pool);
  if (side == 1 && c.p.pool.activation == Activation::relu) {
    return visit(MaskedSource<Sink>{.grad_y = grad_y,
                                    .y = static_cast<const T*>(winner_mask),
                                    .in_packs = whole && aligned(winner_mask, kBytes)});
  }
  if (side == 1) return visit(TensorSource<Sink>{.input = grad_y, .in_packs = whole});
  const auto pooled = [&](auto source) {
    source.grad_y = grad_y;
    source.winner_mask = static_cast<const uint8_t*>(winner_mask);
    for (const int axis : {0, 1}) source.windows[axis] = static_cast<int32_t>(c.p.pool.output_size[axis]);
    source.in_packs = whole && aligned(winner_mask, Sink::N);
    visit(source);
  };
  return side == 2 ? pooled(PooledSource<Sink, 2>{}) : pooled(PooledSource<Sink, 3>{});
}

template <typename T>
ConvFinish<T> forward_finish(const CudaConv& c, const void* bias, void* y, void* winner_mask) {
  const bool whole = c.p.conv.out_channels % kPackSize<T> == 0;
  return {.bias = static_cast<const T*>(bias),
          .y = static_cast<T*>(y),
          .winner_mask = static_cast<uint8_t*>(winner_mask),
          .relu = c.p.pool.activation == Activation::relu,
          .packed = whole && aligned_16(y) && aligned_16(winner_mask),
          .bias_packed = whole && aligned_16(bias)};
}

template <typename T>
ConvFinish<T> grad_input_finish(const CudaConv& c, void* grad_input) {
  return {.bias = nullptr,
          .y = static_cast<T*>(grad_input),
          .winner_mask = nullptr,
          .relu = false,
          .packed = c.p.conv.in_channels % kPackSize<T> == 0 && aligned_16(grad_input),
          .bias_packed = false};
}

// Multiply-adds of a block for every number along k.
template <typename W>
double block_macs(int64_t columns) {
  return 16.0 * W::fragments * kConvWarps * 8.0 * static_cast<double>(columns);
}

template <typename W>
std::optional<ConvWork> channels_work(const ConvView& v, int64_t columns, const CudaConv& c,
                                      const CudaDevice& device) {
  const int64_t bytes = bytes_of(c.dtype);
  const auto fit = fit_channels<W>(v, bytes, 8 * columns, device);
  if (!fit) return std::nullopt;
  const int64_t k = round_up(v.in_channels, kStepBytes / bytes) * v.kernel[0] * v.kernel[1];
  return ConvWork{fit->tiling.blocks, block_macs<W>(columns) * static_cast<double>(k)};
}

inline bool turnable(const CudaConv& c) {
  return c.p.conv.stride[0] == 1 && c.p.conv.stride[1] == 1;
}

// What every kernel of this family asks of a problem.
inline bool acceptable(const CudaConv& c, MathMode math_mode) {
  return c.math_mode == math_mode && c.dtype != Dtype::float64 && c.p.conv.groups == 1 &&
         c.p.pool.channels_last && window_side(c.p.pool) != 0;
}

}  // namespace dlfast
