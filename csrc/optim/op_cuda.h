// A step on CUDA devices, from Python.
#pragma once

#include <torch/extension.h>

namespace dlfast::optim {

void bind_cuda(pybind11::module_& m);

}  // namespace dlfast::optim
