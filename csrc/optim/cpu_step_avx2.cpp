// The CPU optimizer step for one SIMD level; see common/simd.h for the order of includes.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "optim/cpu_step.h"

#if DLFAST_X86
DLFAST_TARGET_AVX2
#define DLFAST_LEVEL avx2
#define DLFAST_LANES 8
#include "optim/cpu_body.h"
DLFAST_TARGET_END
#endif
