// What tells whether tensors are still what something was computed from and kept, at the cost of a look.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace dlfast {

// Equal strings: nothing has changed. Compares address, version, dtype and strides, which tell of every
// change that PyTorch's own operators make. What is written through `.data` leaves no trace there, so that of
// tensors on the CPU numbers are compared as well: all of a vector, and 64 from all over any other. The
// tensors must count versions.
std::string tensors_state(const std::vector<at::Tensor>& tensors);

}  // namespace dlfast
