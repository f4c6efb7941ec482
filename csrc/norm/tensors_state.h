// What tells whether tensors are still what something was computed from and kept, at the cost of a look.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>

#include <string>
#include <vector>

namespace dlfast {

// Addresses prove nothing: a tensor that is made anew on every call lands where the last one was. Every
// tensor has a counter of its versions, which its views share and nobody else has. It is held here, so that
// no other can take its place, and so is the memory's entry, weakly. Neither is a reference to the tensor: it
// is freed and swapped (torch.utils.swap_tensors) as if nobody looked.
//
// Counter and version tell of every change that PyTorch's operators make. What is written through `.data`
// leaves no trace there, so that of tensors on the CPU numbers are compared as well: all of a vector and of
// what is small, and 64 from all over any other.
class TensorsState {
 public:
  // Raises where a tensor counts no versions (made in inference mode) or has no memory of its own (sparse).
  explicit TensorsState(const std::vector<at::Tensor>& tensors);

  // Whether `tensors` are the same, unchanged.
  bool holds(const std::vector<at::Tensor>& tensors) const;

 private:
  struct Entry {
    c10::VariableVersion counter;
    uint32_t version;
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    const void* data;
    at::ScalarType dtype;
    at::Device device;
    at::DimVector sizes, strides;
    std::string numbers;
  };
  static bool same(const Entry& entry, const at::Tensor& tensor);

  std::vector<Entry> entries_;
};

}  // namespace dlfast
