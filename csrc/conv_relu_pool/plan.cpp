#include "conv_relu_pool/plan.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dlfast {
namespace {

// Half of a usual second-level cache, in floats; the other half is for weights and output.
constexpr int64_t kUnitFloats = 64 * 1024;
constexpr int64_t kUnitsPerThread = 4;

std::string_view forced_plan() {
  const char* asked = std::getenv("DLFAST_PLAN");
  const std::string_view plan = asked == nullptr ? "" : asked;
  if (plan != "" && plan != "direct" && plan != "winograd2" && plan != "winograd4" && plan != "epilogue") {
    throw std::invalid_argument("DLFAST_PLAN must be direct, winograd2, winograd4 or epilogue, got " +
                                std::string(plan));
  }
  return plan;
}

bool pools(const ConvBlockParams& p) {
  return p.pool.pool != Pool::none;
}

bool forward_fits_with(ConvBlockParams p, int64_t winograd, Dtype dtype, bool save_code) {
  p.winograd = winograd;
  return forward_fits(p, dtype, save_code);
}

}  // namespace

ForwardPath plan_forward(const ConvBlockParams& p, Dtype dtype, bool cpu, bool save_code) {
  const std::string_view forced = forced_plan();
  if (!cpu || forced == "epilogue" || !forward_fits_with(p, 0, dtype, save_code)) return ForwardPath::epilogue;
  const bool winograd = forward_fits_with(p, 2, dtype, save_code);
  if (forced == "winograd2" && winograd) return ForwardPath::winograd2;
  if (forced == "winograd4" && winograd) return ForwardPath::winograd4;
  if (forced != "") return ForwardPath::direct;
  if (winograd && p.conv.group_in() >= 16) return ForwardPath::winograd4;
  return pools(p) ? ForwardPath::direct : ForwardPath::epilogue;
}

GradientPath plan_grad_weight(const ConvBlockParams& p, Dtype dtype, bool cpu) {
  const std::string_view forced = forced_plan();
  if (!cpu || forced == "epilogue") return GradientPath::pytorch;
  if (grad_weight_patches_fits(p, dtype, cpu_kernels())) return GradientPath::patches;
  return grad_weight_fits(p, dtype) ? GradientPath::sparse : GradientPath::pytorch;
}

GradientPath plan_grad_input(const ConvBlockParams& p, Dtype dtype, bool cpu) {
  const std::string_view forced = forced_plan();
  if (!cpu || forced == "epilogue") return GradientPath::pytorch;
  return grad_input_fits(p, dtype) ? GradientPath::sparse : GradientPath::pytorch;
}

int64_t plan_grain(const ConvBlockParams& p, double floats_per_conv_row, int64_t threads) {
  const auto by_cache = static_cast<int64_t>(kUnitFloats / (floats_per_conv_row * p.pool.window.stride[0]));
  const int64_t by_balance = p.conv.batch * p.pool.output_size[0] / (kUnitsPerThread * threads);
  return std::max<int64_t>(1, std::min(by_cache, by_balance));
}

}  // namespace dlfast
