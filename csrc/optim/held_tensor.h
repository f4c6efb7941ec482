// A tensor by its Python object. A reference of the step's own would keep torch.utils.swap_tensors from
// working, and would go on with what the object was before.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace dlfast::optim {

namespace py = pybind11;

// As pybind11's own types are.
#define DLFAST_HIDDEN __attribute__((visibility("hidden")))

class DLFAST_HIDDEN HeldTensor {
 public:
  HeldTensor() = default;
  // Refuses with TypeError what is no tensor.
  explicit HeldTensor(const py::handle& object);
  bool defined() const { return static_cast<bool>(object_); }
  const at::Tensor& operator*() const;
  const at::Tensor* operator->() const { return &**this; }

 private:
  py::object object_;
};

}  // namespace dlfast::optim
