// The tables of kernels that each operator asks for: those of the level in use.
#include "simd/kernels.h"

namespace dlfast {

const LevelKernels& level_kernels() {
#if DLFAST_X86
  switch (simd_level()) {
    case SimdLevel::avx512:
      return kernels_avx512();
    case SimdLevel::avx2:
      return kernels_avx2();
    default:
      break;
  }
#endif
  return kernels_portable();
}

const PoolKernels& pool_cpu() {
  return level_kernels().pool;
}

const NormKernels& norm_cpu() {
  return level_kernels().norm;
}

const ConvKernels& conv_cpu() {
  return level_kernels().conv;
}

const optim::CpuKernels& optim::step_kernels() {
  return level_kernels().optim;
}

}  // namespace dlfast
