// Which SIMD level the CPU kernels run at: chosen once per process, one binary for all machines.
//
// A file cpu_<level>.cpp compiles the bodies of one level. It includes every shared header first, then
// expands DLFAST_TARGET_AVX2 or DLFAST_TARGET_AVX512, and only then includes core/vec.h and the bodies:
// no inline function that other files share may be compiled for the higher level, and the compiler lowers
// vector types by the target of the function they stand in, so vec.h must come after.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DLFAST_X86 1
#else
#define DLFAST_X86 0
#endif

// GCC ends a target with the file, clang wants the pop.
#if defined(__clang__)
#define DLFAST_TARGET_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define DLFAST_TARGET_AVX512                                                                                 \
  _Pragma(                                                                                                   \
      "clang attribute push(__attribute__((target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl\"))), " \
      "apply_to = function)")
#define DLFAST_TARGET_END _Pragma("clang attribute pop")
#else
#define DLFAST_TARGET_AVX2 _Pragma("GCC target(\"avx2,fma,f16c\")")
#define DLFAST_TARGET_AVX512 \
  _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512\")")
#define DLFAST_TARGET_END
#endif

// For tests: the kernels of 16 lanes in AVX2 instructions, two registers for each of AVX-512, so that a CPU
// without AVX-512 runs all that differs between the levels but the instructions.
#if defined(DLFAST_WIDE_ON_AVX2)
#undef DLFAST_TARGET_AVX512
#define DLFAST_TARGET_AVX512 DLFAST_TARGET_AVX2
#endif

namespace dlfast {

enum class SimdLevel : int { portable = 0, avx2 = 1, avx512 = 2 };

inline const char* simd_name(SimdLevel level) {
  constexpr const char* names[] = {"default", "avx2", "avx512"};
  return names[static_cast<int>(level)];
}

inline SimdLevel simd_supported() {
#if DLFAST_X86
#if defined(DLFAST_WIDE_ON_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SimdLevel::avx512;
#endif
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return SimdLevel::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SimdLevel::avx2;
#endif
  return SimdLevel::portable;
}

// DLFAST_CPU_CAPABILITY=default|avx2|avx512 lowers the level, as ATEN_CPU_CAPABILITY does for PyTorch.
inline SimdLevel choose_simd_level() {
  const SimdLevel best = simd_supported();
  const char* asked = std::getenv("DLFAST_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') return best;
  for (const SimdLevel level : {SimdLevel::portable, SimdLevel::avx2, SimdLevel::avx512}) {
    if (std::string_view(asked) != simd_name(level)) continue;
    if (level > best) {
      throw std::runtime_error(std::string("DLFAST_CPU_CAPABILITY=") + asked + ": this CPU supports up to " +
                               simd_name(best));
    }
    return level;
  }
  throw std::runtime_error(std::string("DLFAST_CPU_CAPABILITY must be default, avx2 or avx512, got ") +
                           asked);
}

inline SimdLevel simd_level() {
  static const SimdLevel level = choose_simd_level();
  return level;
}

}  // namespace dlfast
