// What Python is given of the choice on CUDA, beside the reports of library.cpp.
#pragma once

#ifdef DLFAST_WITH_CUDA
#include <torch/extension.h>

namespace dlfast {

void bind_cuda(pybind11::module_& m);

}  // namespace dlfast
#endif
