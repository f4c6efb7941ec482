// What the machine can do: the two lines of the roofline that choices are explained with.
#pragma once

namespace dlfast {

// Multiplications and additions of float32 per second, in registers, on all threads of ATen.
double peak_flops();

// Bytes per second that all threads of ATen read plus write when copying memory far larger than the caches.
double peak_bandwidth();

}  // namespace dlfast
