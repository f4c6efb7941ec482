// The tensors of one step on their way into the form of params.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <utility>
#include <vector>

#include "optim/op_checks.h"

namespace dlfast::optim {

// The tensors of one step in the form of params.h. What does not lie in one order without gaps is copied
// into the order of its parameter and, where the step writes it, back.
class DLFAST_HIDDEN Layouts {
 public:
  TensorRef ref(const Item& item) {
    TensorRef ref = item.ref;
    if (!item.in_order) {
      // A parameter with gaps is stood in for by a contiguous copy, whose order the others then follow.
      const bool has_gaps = !item.param->is_non_overlapping_and_dense();
      const at::Tensor param =
          has_gaps ? at::empty_like(*item.param, at::MemoryFormat::Contiguous) : *item.param;
      ref.param = written(*item.param, param);
      for (int k = 0; k < kMaxStates; ++k) {
        if (item.state[k].defined()) ref.state[k] = written(*item.state[k], param);
      }
      if (item.average.defined()) ref.average = written(*item.average, param);
      if (item.master.defined()) ref.master = written(*item.master, param);
      ref.grad = read(item.grad, param);
    } else {
      // Not copied: a second reference of C++ to a tensor has PyTorch take the GIL, to keep its Python
      // object.
      ref.grad = read(item.grad, *item.param);
    }
    return ref;
  }

  void write_back() {
    for (auto& [to, from] : back_) to.copy_(from);
  }

 private:
  // Only zeroing writes it.
  void* read(const at::Tensor& grad, const at::Tensor& param) {
    if (same_order(grad, param)) return const_cast<void*>(grad.const_data_ptr());
    held_.push_back(at::empty_like(param).copy_(grad));
    return held_.back().mutable_data_ptr();
  }

  void* written(const at::Tensor& tensor, const at::Tensor& param) {
    if (same_order(tensor, param)) return tensor.mutable_data_ptr();
    at::Tensor copy = at::empty_strided(param.sizes(), param.strides(), tensor.options()).copy_(tensor);
    back_.emplace_back(tensor, copy);
    return copy.mutable_data_ptr();
  }

  std::vector<at::Tensor> held_;
  std::vector<std::pair<at::Tensor, at::Tensor>> back_;  // to, from
};

// Lets go of the gradients when a call ends: a step must not hold them beyond their time.
class DLFAST_HIDDEN GradientsHeld {
 public:
  explicit GradientsHeld(std::vector<Item>& items) : items_(items) {}
  ~GradientsHeld() {
    for (Item& item : items_) item.grad = at::Tensor();
  }
  GradientsHeld(const GradientsHeld&) = delete;
  GradientsHeld& operator=(const GradientsHeld&) = delete;

 private:
  std::vector<Item>& items_;
};

inline void bump_version(const at::Tensor& t) {
  if (t.defined() && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Of all that a step writes of an item, beside gradients.
inline void bump_versions(const Item& item) {
  for_each_written(item, bump_version);
  for (const HeldTensor& scale : item.scale) {
    if (scale.defined()) bump_version(*scale);
  }
  if (item.step.defined()) bump_version(*item.step);
}

// Clears what a pass over memory could not: copies, and gradients that several parameters share (`all`).
inline void clear_rest(const std::vector<Item>& items, bool all) {
  for (const Item& item : items) {
    if (all || !item.in_order || !same_order(item.grad, *item.param)) item.grad.zero_();
  }
}

}  // namespace dlfast::optim
