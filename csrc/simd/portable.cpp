// The CPU kernels of one SIMD level; see core/simd.h for the order of includes.
#include "core/cpu_prelude.h"
#include "simd/kernels.h"

#define DLFAST_LEVEL portable
#define DLFAST_LANES 4
#include "simd/table.inc"
