// The CPU kernels of convolution blocks for one SIMD level; see common/simd.h for the order of includes.
#include "conv_relu_pool/cpu_shared.h"

#if DLFAST_X86
DLFAST_TARGET_AVX2
#define DLFAST_LEVEL avx2
#define DLFAST_LANES 8
#include "conv_relu_pool/cpu_bodies.h"
DLFAST_TARGET_END
#endif
