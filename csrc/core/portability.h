// The only door to CUDA's device headers. Kernel bodies (kernel_*.cuh) and the small headers they share with
// host code include this, and nothing else of CUDA.
//
// Conversions are spelled out: torch compiles with the operators of __half and __nv_bfloat16 switched off.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DLFAST_DEVICE __device__ __forceinline__
#define DLFAST_HOST_DEVICE __host__ __device__ __forceinline__

namespace dlfast {

// The type arithmetic is done in: float32, or float64 for float64.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

DLFAST_DEVICE float widen(float x) {
  return x;
}
DLFAST_DEVICE double widen(double x) {
  return x;
}
DLFAST_DEVICE float widen(__half x) {
  return __half2float(x);
}
DLFAST_DEVICE float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
DLFAST_DEVICE T narrow(Accumulator<T> x) {
  return x;
}
template <>
DLFAST_DEVICE __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
DLFAST_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

}  // namespace dlfast
#else
#define DLFAST_HOST_DEVICE inline
#endif
