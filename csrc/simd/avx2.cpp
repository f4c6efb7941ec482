// The CPU kernels of one SIMD level; see core/simd.h for the order of includes.
#include "core/cpu_prelude.h"
#include "simd/kernels.h"

#if DLFAST_X86
DLFAST_TARGET_AVX2
#define DLFAST_LEVEL avx2
#define DLFAST_LANES 8
#include "simd/table.inc"
DLFAST_TARGET_END
#endif
