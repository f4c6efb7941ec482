// The CPU kernels of convolution blocks for one SIMD level; see common/simd.h for the order of includes.
#include "conv_relu_pool/cpu_shared.h"

#define DLFAST_LEVEL portable
#define DLFAST_LANES 4
#include "conv_relu_pool/cpu_bodies.h"
