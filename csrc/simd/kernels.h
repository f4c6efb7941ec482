// The CPU kernels of one SIMD level, of every operator, as a table.
#pragma once

#include "conv/cpu/kernels.h"
#include "core/simd.h"
#include "norm/kernels.h"
#include "optim/cpu/step.h"
#include "pool/kernels.h"

namespace dlfast {

struct LevelKernels {
  PoolKernels pool;
  NormKernels norm;
  ConvKernels conv;
  const optim::CpuKernels& optim;
  // Runs `rounds` of independent multiply-adds in registers; how many multiplications and additions that was.
  double (*multiply_adds)(int64_t rounds);
};

const LevelKernels& kernels_portable();
#if DLFAST_X86
const LevelKernels& kernels_avx2();
const LevelKernels& kernels_avx512();
#endif

// Of the level in use.
const LevelKernels& level_kernels();

}  // namespace dlfast
