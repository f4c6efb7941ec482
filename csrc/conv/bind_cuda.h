// What Python is given of the choice on CUDA, beside the reports of python.cpp.
#pragma once

#ifdef DLFAST_WITH_CUDA
#include <pybind11/pybind11.h>

namespace dlfast {

void bind_cuda(pybind11::module_& m);

}  // namespace dlfast
#endif
