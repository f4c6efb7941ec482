// A step on CUDA devices, from Python.
#pragma once

#include <pybind11/pybind11.h>

namespace dlfast::optim {

void bind_cuda(pybind11::module_& m);

}  // namespace dlfast::optim
