// tiling_of(): host code alone.
#include "conv/cuda/launch_grad_weight.h"
#include "core/math.h"

#include <algorithm>
#include <numeric>

#include "conv/cuda/kernel_grad_weight_products.cuh"

namespace dlfast::grad_weight {
namespace {

// The least number from n on that is `remainder` modulo `modulus`.
constexpr int64_t congruent(int64_t n, int64_t remainder, int64_t modulus) {
  return n + ((remainder - n) % modulus + modulus) % modulus;
}

// Rounded up.
constexpr int32_t log2_of(int64_t n) {
  int32_t log = 0;
  while ((int64_t{1} << log) < n) ++log;
  return log;
}

constexpr int64_t kFewChannels = 4;  // as many as planes are for
constexpr int64_t kMostImages = 127, kMostSide = 4095, kMostPatchSide = 32767, kMostSlots = 1 << 20;

// What a warp of each kind multiplies, and the time it takes.
struct WarpShape {
  int64_t outputs, columns;
  int64_t sums;  // of a thread
  int64_t step_pixels;
  double step_cycles;  // while all eight warps of a block take a step
};

// Two warps on each of four tensor cores, which need 8 cycles for an mma; fused multiply-adds of a warp
// need 2.
template <typename Products>
WarpShape tensor_warp() {
  return {Products::kOutputs, Products::kColumns, Products::kSums, kStepPixels<typename Products::T>,
          Products::kSums / 4 * 8.0 * 2.0};
}
template <typename Products>
WarpShape fma_warp() {
  return {Products::kOutputs, Products::kColumns, Products::kSums, 1, Products::kSums * 2.0 * 2.0};
}

template <typename T>
WarpShape shape_of(Kind kind) {
  switch (kind) {
    case Kind::tensor_slots:
      return tensor_warp<TensorSlots<T>>();
    case Kind::tensor_planes:
      return tensor_warp<TensorPlanes<T, 4>>();
    case Kind::tensor_planes_narrow:
      return tensor_warp<TensorPlanes<T, 2>>();
    case Kind::fma_slots:
    case Kind::fma_planes:
      return fma_warp<Fma<T, SlotsLoader<T>>>();
  }
  return {};
}

Kind kind_of(const CudaConv& c) {
  const bool few = c.p.conv.in_channels <= kFewChannels;
  if (c.math_mode == MathMode::fma) return few ? Kind::fma_planes : Kind::fma_slots;
  if (!few) return Kind::tensor_slots;
  return c.p.conv.out_channels <= 32 ? Kind::tensor_planes_narrow : Kind::tensor_planes;
}

bool accepts(const CudaConv& c) {
  const ConvParams& conv = c.p.conv;
  const ReluPoolParams& pool = c.p.pool;
  if (conv.groups != 1 || c.dtype == Dtype::float64 || pool.pool == Pool::avg) return false;
  if (pool.input_numel() == 0 || pool.output_numel() == 0 || conv.in_channels == 0) return false;
  for (const int axis : {0, 1}) {
    const PoolWindow& window = pool.window;
    const bool disjoint = window.padding[axis] == 0 && window.size[axis] <= window.stride[axis];
    if (pool.pool == Pool::max && (!disjoint || window.stride[axis] > 8)) return false;
  }
  const auto& [height, width] = conv.input_size;
  return std::max({conv.batch, conv.in_channels * conv.positions(), conv.out_channels,
                   height + conv.padding[0], width + conv.padding[1], conv.stride[0], conv.stride[1]}) <
         (int64_t{1} << 30);
}

class TilingSearch {
 public:
  TilingSearch(const CudaConv& c, const CudaDevice& device)
      : c_(c),
        device_(device),
        element_(c.dtype == Dtype::float32 ? 4 : 2),
        kind_(kind_of(c)),
        planes_(c.p.conv.in_channels <= kFewChannels),
        // Shapes depend on the size of the type alone.
        warp_(element_ == 4 ? shape_of<float>(kind_) : shape_of<__half>(kind_)) {}

  std::optional<Tiling> best() {
    for (int64_t limit = 256 / element_; limit >= 16 && !best_; limit /= 2) {
      if (planes_) {
        by_tiles(with_planes(problem()), limit);
      } else {
        for (int64_t channels = 8; channels <= 128; channels *= 2) {
          if (channels > 8 && channels / 2 >= c_.p.conv.in_channels) break;
          const int64_t most = kWarps / warps_outputs() * warp_.columns;
          if (channels <= most) by_tiles(with_slots(problem(), channels, most), limit);
        }
      }
    }
    return best_;
  }

 private:
  int64_t warps_outputs() const {
    return c_.p.conv.out_channels <= warp_.outputs || warp_.outputs == 64 ? 1 : 2;
  }

  Params problem() const {
    const ConvParams& conv = c_.p.conv;
    const ReluPoolParams& pool = c_.p.pool;
    Params p{};
    p.batch = static_cast<int32_t>(conv.batch);
    p.channels = static_cast<int32_t>(conv.in_channels);
    p.outputs = static_cast<int32_t>(conv.out_channels);
    for (const int axis : {0, 1}) {
      p.in[axis] = static_cast<int32_t>(conv.input_size[axis]);
      p.pixels_of[axis] = static_cast<int32_t>(conv.output_size[axis]);
      p.pooled[axis] = static_cast<int32_t>(pool.output_size[axis]);
      p.kernel[axis] = static_cast<int32_t>(conv.kernel[axis]);
      p.stride[axis] = static_cast<int32_t>(conv.stride[axis]);
      p.padding[axis] = static_cast<int32_t>(conv.padding[axis]);
      p.dilation[axis] = static_cast<int32_t>(conv.dilation[axis]);
      p.window[axis] = pool.pool == Pool::none ? 1 : static_cast<int32_t>(pool.window.size[axis]);
      p.window_stride[axis] = pool.pool == Pool::none ? 1 : static_cast<int32_t>(pool.window.stride[axis]);
    }
    p.passing = pool.pool == Pool::max                ? Passing::winners
                : pool.activation == Activation::relu ? Passing::positive
                                                      : Passing::all;
    p.log_warps_outputs = log2_of(warps_outputs());
    p.block_outputs = static_cast<int32_t>(warps_outputs() * warp_.outputs);
    p.log_output_packs = log2_of(p.block_outputs * element_ / 16);
    p.blocks_outputs = static_cast<int32_t>(ceil_div(p.outputs, p.block_outputs));
    // Words of a row of eight outputs, or of four of them in each of four pixels, are in different banks.
    p.gradient_pitch = static_cast<int32_t>(p.block_outputs * element_ + (element_ == 2 ? 16 : 32));
    return p;
  }

  void set_warps(Params& p, int64_t columns) const {
    p.log_warps_columns = log2_of(ceil_div(columns, warp_.columns));
    p.warps_pixels = kWarps >> (p.log_warps_outputs + p.log_warps_columns);
    p.columns_in_warps = static_cast<int32_t>(warp_.columns << p.log_warps_columns);
  }

  Params with_planes(Params p) const {
    const int64_t most = kWarps / warps_outputs() * warp_.columns;
    p.layout = PatchLayout::planes;
    p.by_channels = FastDivmod<uint32_t>(static_cast<uint32_t>(p.channels));
    p.block_columns = static_cast<int32_t>(std::min(p.columns(), most));
    p.blocks_columns = static_cast<int32_t>(ceil_div(p.columns(), p.block_columns));
    set_warps(p, p.block_columns);
    return p;
  }

  // `channels` and as many taps as the warps can have.
  Params with_slots(Params p, int64_t channels, int64_t most) const {
    p.layout = PatchLayout::slots;
    p.block_channels = static_cast<int32_t>(channels);
    const int64_t groups = ceil_div(p.taps(), most / channels);
    p.block_taps = static_cast<int32_t>(ceil_div(p.taps(), groups));
    p.blocks_columns =
        static_cast<int32_t>(ceil_div(p.channels, channels) * ceil_div(p.taps(), p.block_taps));
    set_warps(p, p.block_taps * channels);
    const int64_t packs = channels * element_ / 16;
    p.log_channel_packs = log2_of(packs);
    // An odd number of packs, or two more than a multiple of four, as slots differ modulo 8, or modulo 4.
    const int64_t pitch = element_ == 2 ? packs | 1 : (packs % 4 == 2 ? packs : packs + 2);
    p.slot_pitch = static_cast<int32_t>(pitch * 16);
    return p;
  }

  // All sensible tiles of up to `limit` pixels.
  void by_tiles(const Params& block, int64_t limit) {
    const int64_t rows = block.pixels_of[0], columns = block.pixels_of[1];
    // Whole windows; with planes whole words as well.
    const int64_t unit[2] = {
        block.window_stride[0],
        planes_ ? std::lcm(int64_t{block.window_stride[1]}, int64_t{2}) : block.window_stride[1]};
    int64_t previous = 0;
    for (int64_t parts = ceil_div(columns, 64); parts <= columns; ++parts) {
      Params p = block;
      const int64_t width = round_up(ceil_div(columns, parts), unit[1]);
      if (width == previous) continue;
      previous = width;
      if (width * unit[0] > limit) continue;
      const int64_t fitting = limit / width / unit[0] * unit[0];
      const int64_t height = round_up(ceil_div(rows, ceil_div(rows, fitting)), unit[0]);
      p.tile[0] = static_cast<int32_t>(height);
      p.tile[1] = static_cast<int32_t>(width);
      p.images =
          static_cast<int32_t>(height >= rows && width >= columns
                                   ? std::min({int64_t{p.batch}, kMostImages, limit / (height * width)})
                                   : 1);
      consider(p);
      if (width <= 4) break;
    }
  }

  void consider(Params p) {
    p.pixels =
        static_cast<int32_t>(round_up(int64_t{p.images} * p.tile[0] * p.tile[1], kStepBytes / element_));
    if (!set_patch(p)) return;
    int64_t tiles = ceil_div(p.batch, p.images);
    for (const int axis : {0, 1}) {
      const int64_t along = ceil_div(p.pixels_of[axis], p.tile[axis]);
      p.by_tiles[axis] = FastDivmod<uint32_t>(static_cast<uint32_t>(along));
      p.windows[axis] = p.tile[axis] / p.window_stride[axis];
      p.by_windows[axis] = FastDivmod<uint32_t>(static_cast<uint32_t>(p.windows[axis]));
      tiles *= along;
    }
    if (tiles >= (int64_t{1} << 30)) return;
    p.tiles = static_cast<int32_t>(tiles);
    const int64_t shared = set_shared(p);
    if (shared > device_.shared_bytes) return;
    const double cost = cycles(p) * (shared > device_.shared_bytes / 2 ? kLonely : 1.0);
    if (best_ && cost >= best_cost_) return;
    const int64_t wanted = kBlocksPerProcessor * device_.processors;
    p.splits = static_cast<int32_t>(
        std::clamp<int64_t>(wanted / (int64_t{p.blocks_outputs} * p.blocks_columns), 1, tiles));
    best_ = Tiling{.kind = kind_, .p = p, .shared_bytes = shared};
    best_cost_ = cost;
  }

  bool set_patch(Params& p) const {
    for (const int axis : {0, 1}) {
      const int64_t side =
          (p.tile[axis] - int64_t{1}) * p.stride[axis] + (p.kernel[axis] - int64_t{1}) * p.dilation[axis] + 1;
      if (side > kMostPatchSide || p.tile[axis] > kMostSide) return false;
      p.patch[axis] = static_cast<int32_t>(side);
      p.phase[axis] = static_cast<int32_t>(ceil_div(side, p.stride[axis]));
    }
    const int64_t width = int64_t{p.phase[1]} * std::min(p.stride[1], p.patch[1]);
    const int64_t height = int64_t{p.phase[0]} * std::min(p.stride[0], p.patch[0]);
    const int64_t pitch = planes_ ? plane_row(p, width) : congruent(width, p.tile[1], 8);
    const int64_t image = congruent(height * pitch, planes_ ? 0 : p.tile[0] * p.tile[1], planes_ ? 2 : 8);
    if (image * p.images >= kMostSlots) return false;
    p.row_pitch = static_cast<int32_t>(pitch);
    p.image_pitch = static_cast<int32_t>(image);
    const int64_t slots = image * p.images;
    if (!planes_) {
      p.patch_bytes = static_cast<int32_t>(round_up(slots * p.slot_pitch, kZeroBytes));
      return true;
    }
    // Banks of a plane follow those of the one before, as rows do; copies share those of a row.
    const int64_t copy = element_ == 2 ? congruent(ceil_div(slots, 2), ceil_div(p.kernel[1], 2) + 3, 32) : 0;
    const int64_t words = element_ == 2 ? 2 * copy : slots;
    const int64_t plane = congruent(words, int64_t{p.kernel[0]} * row_banks(p), 32);
    p.copy_pitch = static_cast<int32_t>(copy * 4);
    p.plane_pitch = static_cast<int32_t>(plane * 4);
    p.patch_bytes = static_cast<int32_t>(round_up(plane * 4 * p.channels, kZeroBytes));
    return true;
  }

  // The banks that a warp reads at once for all taps of a row, each of them four neighbouring words.
  static int64_t row_banks_of(int64_t taps, int64_t element) {
    if (taps == 1) return 4;
    return element == 4 ? taps + 3 : ceil_div(taps, 2) + 3 + taps / 2 + 3;
  }
  int64_t row_banks(const Params& p) const { return row_banks_of(p.kernel[1], element_); }

  // Slots from row to row, so that the rows of taps that a warp reads at once are in different banks.
  int64_t plane_row(const Params& p, int64_t width) const {
    const int64_t per_word = 4 / element_;
    return congruent(ceil_div(width, per_word), row_banks(p), 32) * per_word;
  }

  int64_t set_shared(Params& p) const {
    int64_t bytes = 0;
    const auto take = [&](int32_t& at, int64_t count) {
      at = static_cast<int32_t>(bytes);
      bytes = round_up(bytes + count, kZeroBytes);
    };
    take(p.at_share, static_cast<int64_t>(sizeof(Share)));
    take(p.at_columns, p.columns_in_warps * static_cast<int64_t>(sizeof(ColumnEntry)));
    take(p.at_offsets, 2 * int64_t{p.pixels} * static_cast<int64_t>(sizeof(int32_t)));
    take(p.at_pixels, p.pixels * static_cast<int64_t>(sizeof(PixelEntry)));
    take(p.at_positions, p.positions() * static_cast<int64_t>(sizeof(PositionEntry)));
    take(p.at_bias, (kThreads * (16 / element_) + 32) * static_cast<int64_t>(sizeof(float)));
    p.gradient_bytes = p.pixels * p.gradient_pitch;
    take(p.at_gradient, 2 * int64_t{p.gradient_bytes});
    // Warps exchange their sums where tiles were.
    const int64_t exchanged =
        p.warps_pixels > 1 ? warp_.sums * kThreads / 2 * static_cast<int64_t>(sizeof(float)) : 0;
    const int64_t least = (exchanged - 2 * int64_t{p.gradient_bytes}) / 2;
    if (least > p.patch_bytes) p.patch_bytes = static_cast<int32_t>(round_up(least, kZeroBytes));
    take(p.at_patch, 2 * int64_t{p.patch_bytes} + kZeroBytes);
    return bytes;
  }

  // What all blocks of one column of splits need for the whole problem, in cycles of a processor: products,
  // and instructions of the loaders, about as many as counted in their code, two warps on each scheduler.
  double cycles(const Params& p) const {
    const double steps = static_cast<double>(ceil_div(ceil_div(p.pixels, warp_.step_pixels), p.warps_pixels));
    const double windows = static_cast<double>(p.images) * p.windows[0] * p.windows[1];
    const double expanded =
        windows * p.block_outputs * element_ / 16 * (60.0 + 20.0 * p.window_stride[0] * p.window_stride[1]);
    const double copied = static_cast<double>(p.positions()) *
                          (planes_ ? 50.0 * p.channels : 30.0 * p.block_channels * element_ / 16);
    const double tile = steps * warp_.step_cycles + 2.0 * (expanded + copied) / kThreads + kTileCycles;
    return tile * p.tiles * p.blocks_outputs * p.blocks_columns;
  }

  static constexpr double kTileCycles = 400;  // barriers, and what latency is left
  static constexpr double kLonely = 1.2;      // where only one block fits a processor
  static constexpr int64_t kBlocksPerProcessor = 2;

  const CudaConv& c_;
  const CudaDevice& device_;
  const int64_t element_;  // bytes
  const Kind kind_;
  const bool planes_;
  const WarpShape warp_;
  std::optional<Tiling> best_;
  double best_cost_ = 0;
};

}  // namespace

std::optional<Tiling> tiling_of(const CudaConv& c, const CudaDevice& device) {
  static Memo<std::optional<Tiling>> memo;
  if (!accepts(c)) return std::nullopt;
  return memo.get(memo_key(c, device), [&] { return TilingSearch(c, device).best(); });
}

}  // namespace dlfast::grad_weight
