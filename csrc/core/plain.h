// Whether tensors are PyTorch's own, dense, on one of our devices, and nobody looks on: then an operator may
// run its kernel without asking the dispatcher, which would come to the same.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

namespace dlfast {

// Of a tensor that may not be there.
inline c10::DispatchKeySet keys_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.key_set() : c10::DispatchKeySet();
}
inline c10::DispatchKeySet keys_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? keys_of(*tensor) : c10::DispatchKeySet();
}

// All else that can be in a set asks for something: tensors of classes of their own, modes, tracing, vmap and
// grad transforms, batches, layouts, views that conjugate.
inline bool is_plain(const at::Tensor& first, c10::DispatchKeySet of_others) {
  if (!first.is_cpu() && !first.is_cuda()) return false;
  const c10::impl::LocalDispatchKeySet here = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet keys = ((first.key_set() | of_others) | here.included_) - here.excluded_;
  constexpr c10::DispatchKeySet known = c10::DispatchKeySet(
      {c10::DispatchKey::Dense, c10::DispatchKey::AutogradFunctionality, c10::DispatchKey::ADInplaceOrView,
       c10::DispatchKey::BackendSelect, c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});
  // The set also tells devices, which this leaves in: those who check operands compare them.
  return ((keys - known).raw_repr() & ~c10::full_backend_mask) == 0;
}

// Of forward-mode differentiation.
inline bool has_tangent(const at::Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const std::optional<at::Tensor>& tensor) {
  return tensor && has_tangent(*tensor);
}

template <typename... Tensors>
bool are_plain(const at::Tensor& first, const Tensors&... others) {
  return is_plain(first, (c10::DispatchKeySet() | ... | keys_of(others))) && !has_tangent(first) &&
         !(has_tangent(others) || ...);
}

}  // namespace dlfast
