#include "optim/held_tensor.h"

#include <torch/csrc/autograd/python_variable.h>

namespace dlfast::optim {

HeldTensor::HeldTensor(const py::handle& object) : object_(py::reinterpret_borrow<py::object>(object)) {
  TORCH_CHECK_TYPE(THPVariable_Check(object.ptr()), "a step takes tensors, got ",
                   py::str(py::type::handle_of(object)));
}

const at::Tensor& HeldTensor::operator*() const {
  return THPVariable_Unpack(object_.ptr());
}

}  // namespace dlfast::optim
