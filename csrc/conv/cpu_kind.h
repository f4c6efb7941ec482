// Which CPU algorithms are chosen for: this one, or the kind that DLFAST_CPU_KIND names, so that a test sees
// on any machine what another chooses. What runs is this machine's kernels all the same.
#pragma once

#include "core/dtype.h"
#include "core/simd.h"

namespace dlfast {

struct CpuKind {
  const char* name;  // empty for this machine
  SimdLevel own;     // the CPU's, which PyTorch's kernels use
  SimdLevel level;   // of our kernels: the same unless DLFAST_CPU_CAPABILITY lowers it
  // How many products of the dtype PyTorch's convolution makes while it makes one of float32; 0 without
  // instructions for them.
  double bfloat16, float16;

  int64_t lanes() const;       // floats in a register
  double level_speed() const;  // of our kernels, in relation to the CPU's own level
  double products_of_16_bits(Dtype dtype) const;
  // Multiplications and additions of float32 that one thread makes in a second, about: in relation to each
  // other times do not depend on it.
  double nominal_flops() const;
};

// The environment is looked at in every call.
CpuKind assumed_cpu();

}  // namespace dlfast
