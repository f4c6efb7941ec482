// From tensors to the plain pointers of params.h: checks and layouts.
//
// The kernels walk a parameter and its gradient and states through memory in one order and without gaps.
// A tensor that does not lie so is copied into the parameter's order and, where the step writes it, back.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "optim/params.h"

namespace dlfast::optim {

// One parameter of a step and what belongs to it; the tensors live as long as the operator's arguments.
struct Item {
  const at::Tensor* param;
  const at::Tensor* grad;
  const at::Tensor* state[kMaxStates];  // null where the group has no such state
  const at::Tensor* step;               // null where no counter is kept
  int64_t group;
};

// Refuses, naming the argument, what the kernels cannot take; nothing has been written then.
// `state_names[k]` is the argument that holds state k.
void check_items(const std::vector<Item>& items, const char* const* state_names, int64_t groups);

// Whether tensors that the step writes share memory, so that they must be updated one after the other.
bool written_tensors_overlap(const std::vector<Item>& items);

// Tells autograd that the written tensors changed.
void bump_versions(const std::vector<Item>& items);

Number number_of(const at::Tensor& param);

// Copies that stand in for tensors of other layouts during one step.
class Layouts {
 public:
  // `first_unit` and, on the CPU, `step` are left unset.
  TensorRef ref(const Item& item);
  void write_back();

 private:
  void* written(const at::Tensor& tensor, const at::Tensor& param);

  std::vector<at::Tensor> held_;
  std::vector<std::pair<at::Tensor, at::Tensor>> back_;  // to, from
};

}  // namespace dlfast::optim
