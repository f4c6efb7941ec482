#include "conv_relu_pool/plan.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dlfast {
namespace {

// Half of a usual second-level cache, in floats; the other half is for weights and output.
constexpr int64_t kBandFloats = 64 * 1024;
constexpr int64_t kBandsPerThread = 4;

std::string_view forced_plan() {
  const char* asked = std::getenv("DLFAST_PLAN");
  const std::string_view plan = asked == nullptr ? "" : asked;
  if (plan != "" && plan != "direct" && plan != "epilogue") {
    throw std::invalid_argument("DLFAST_PLAN must be direct or epilogue, got " + std::string(plan));
  }
  return plan;
}

// With more input channels PyTorch's own convolution is as fast or faster, even with our pass after it
// (blocks of `dlfast bench layers` under DLFAST_PLAN=direct, AVX2: about 1x at 64 channels, 0.94x at 256).
constexpr int64_t kDirectForwardChannels = 64;

// Without pooling there is only the ReLU to save, and every second position passes gradient: PyTorch wins
// (3 to 64 channels at 32x32: forward 0.8x, forward and backward 0.5x).
bool pools(const ConvBlockParams& p) {
  return p.pool.pool != Pool::none;
}

}  // namespace

Path plan_forward(const ConvBlockParams& p, Dtype dtype, bool cpu, bool save_code) {
  const std::string_view forced = forced_plan();
  if (!cpu || dtype != Dtype::float32 || forced == "epilogue" || !direct_forward_fits(p, save_code)) {
    return Path::epilogue;
  }
  return forced == "direct" || (pools(p) && p.conv.in_channels <= kDirectForwardChannels) ? Path::direct
                                                                                          : Path::epilogue;
}

Path plan_grad_weight(const ConvBlockParams& p, Dtype dtype, bool cpu) {
  const std::string_view forced = forced_plan();
  if (!cpu || dtype != Dtype::float32 || forced == "epilogue" || !direct_grad_weight_fits(p, cpu_kernels())) {
    return Path::epilogue;
  }
  return forced == "direct" || pools(p) ? Path::direct : Path::epilogue;
}

int64_t plan_band(const ConvBlockParams& p, double floats_per_conv_row, int64_t threads) {
  const auto by_cache = static_cast<int64_t>(kBandFloats / (floats_per_conv_row * p.pool.window.stride[0]));
  const int64_t by_balance = p.conv.batch * p.pool.output_size[0] / (kBandsPerThread * threads);
  return std::max<int64_t>(1, std::min(by_cache, by_balance));
}

}  // namespace dlfast
