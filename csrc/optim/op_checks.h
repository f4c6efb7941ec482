// What a prepared step accepts: every check of tensors, before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "optim/op_step.h"

namespace dlfast::optim {

// Refuses, naming it, what a step cannot take of an item that is the `index`-th of its step, beside the
// gradient, which may be another at every step: PreparedStep::holds says whether it fits.
void check_item(const Item& item, size_t index, const at::Tensor& first);

// Whether the elements of both lie in memory in the same order, for a `param` without gaps.
bool same_order(const at::Tensor& t, const at::Tensor& param);

// Whether tensors that the step writes share memory, so that they must be updated one after the other.
bool written_tensors_overlap(const std::vector<Item>& items);

// Whether gradients share memory with each other.
bool gradients_overlap(const std::vector<Item>& items);

Format format_of(const at::Tensor& t);

// What a parameter's average and its master weights are kept in.
inline at::ScalarType average_dtype(const at::Tensor& param) {
  return param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
inline at::ScalarType master_dtype(const at::Tensor& param) {
  return param.scalar_type() == at::kBFloat16 ? at::kShort : at::kFloat;
}

// Calls f with every tensor of the parameter's shape that a step writes.
template <typename F>
void for_each_written(const Item& item, F&& f) {
  f(*item.param);
  for (const HeldTensor& state : item.state) {
    if (state.defined()) f(*state);
  }
  for (const HeldTensor* t : {&item.average, &item.master}) {
    if (t->defined()) f(**t);
  }
}

}  // namespace dlfast::optim
