#include "conv/cpu_kind.h"

#include <ATen/core/ivalue.h>
#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

// For versions of PyTorch that do not tell: overload resolution prefers its own function, which is no
// template. Not within dlfast, where this name would hide that one.
namespace untold {
template <typename = void>
std::unordered_map<std::string, c10::IValue> get_cpu_capabilities() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  return {{"amx_bf16", __builtin_cpu_supports("amx-bf16") != 0},
          {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
          {"avx512_fp16", __builtin_cpu_supports("avx512fp16") != 0}};
#else
  return {};
#endif
}
}  // namespace untold

namespace dlfast {
namespace {

// A vector holds twice as many halves, and PyTorch's convolutions of bfloat16 are 1.8 to 2.1 times as fast as
// those of float32 (measured on Zen 4). The tiles of AMX hold 16 times the products, but are fed from memory:
// by the instruction set, not measured.
constexpr double kVectors = 2.0, kTiles = 8.0;

constexpr CpuKind kKinds[] = {
    {"zen2", SimdLevel::avx2, SimdLevel::avx2, 0.0, 0.0},
    {"zen4", SimdLevel::avx512, SimdLevel::avx512, kVectors, 0.0},
    {"skylake-x", SimdLevel::avx512, SimdLevel::avx512, 0.0, 0.0},
    {"sapphire-rapids", SimdLevel::avx512, SimdLevel::avx512, kTiles, kVectors},
    {"aarch64", SimdLevel::portable, SimdLevel::portable, 0.0, 0.0},
};

CpuKind this_cpu() {
  using namespace at::cpu;
  using namespace untold;
  const auto capabilities = get_cpu_capabilities();
  const auto products_by = [&](const char* tiles, const char* vectors) {
    const auto has = [&](const char* name) {
      const auto found = capabilities.find(name);
      return found != capabilities.end() && found->second.isBool() && found->second.toBool();
    };
    return has(tiles) ? kTiles : has(vectors) ? kVectors : 0.0;
  };
  return {"", simd_supported(), simd_level(), products_by("amx_bf16", "avx512_bf16"),
          products_by("amx_fp16", "avx512_fp16")};
}

}  // namespace

int64_t CpuKind::lanes() const {
  constexpr int64_t lanes[] = {4, 8, 16};
  return lanes[static_cast<int>(level)];
}

double CpuKind::level_speed() const {
  constexpr double speeds[] = {1.0, 4.0, 8.0};  // multiply-adds per cycle, in relation
  return speeds[static_cast<int>(level)] / speeds[static_cast<int>(own)];
}

double CpuKind::nominal_flops() const {
  constexpr double kClock = 3e9, kPerRegister = 4.0;  // two multiply-adds at once
  constexpr double lanes[] = {4.0, 8.0, 16.0};
  return kClock * kPerRegister * lanes[static_cast<int>(own)];
}

double CpuKind::products_of_16_bits(Dtype dtype) const {
  return dtype == Dtype::bfloat16 ? bfloat16 : dtype == Dtype::float16 ? float16 : 0.0;
}

CpuKind assumed_cpu() {
  static const CpuKind mine = this_cpu();
  const char* asked = std::getenv("DLFAST_CPU_KIND");
  if (asked == nullptr || *asked == '\0') return mine;
  for (CpuKind kind : kKinds) {
    if (std::string_view(asked) != kind.name) continue;
    if (mine.level < mine.own) kind.level = std::min(kind.level, mine.level);
    return kind;
  }
  throw std::invalid_argument(
      "DLFAST_CPU_KIND must be zen2, zen4, skylake-x, sapphire-rapids or aarch64, got " + std::string(asked));
}

}  // namespace dlfast
