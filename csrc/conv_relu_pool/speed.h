// What the machine can do: the two lines of the roofline that plans are explained with, and its products.
#pragma once

#include "conv_relu_pool/relu_pool.h"

namespace dlfast {

// Multiplications and additions of float32 per second, in registers, on all threads of ATen.
double peak_flops();

// Bytes per second that all threads of ATen read plus write when copying memory far larger than the caches.
double peak_bandwidth();

// How many products of a 16-bit dtype PyTorch's convolution makes while it makes one of float32, on a CPU
// that has instructions for them; 0 on one that has none, and for other dtypes.
double products_of_16_bits(Dtype dtype);

}  // namespace dlfast
