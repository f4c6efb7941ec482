// What the derivatives of all operators need of autograd.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <tuple>
#include <vector>

#include "core/checks.h"

namespace dlfast {

using Mask = std::array<bool, 3>;  // which of grad_input, grad_weight and grad_bias are wanted
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline at::Tensor defined_if(bool wanted, const at::Tensor& tensor) {
  return wanted ? tensor : at::Tensor();
}

// As operators return it: an empty tensor where it is not wanted.
inline Gradients masked(const Mask& mask, const Gradients& grads, const at::Tensor& like) {
  const auto one = [&](bool wanted, const at::Tensor& grad) {
    return wanted ? grad : at::empty({0}, like.options());
  };
  return {one(mask[0], std::get<0>(grads)), one(mask[1], std::get<1>(grads)),
          one(mask[2], std::get<2>(grads))};
}

// The list that a Function returns: these gradients, then as many of inputs that have none.
inline torch::autograd::variable_list gradient_list(const Mask& mask, const Gradients& grads, int others) {
  torch::autograd::variable_list list = {defined_if(mask[0], std::get<0>(grads)),
                                         defined_if(mask[1], std::get<1>(grads)),
                                         defined_if(mask[2], std::get<2>(grads))};
  list.resize(3 + others);
  return list;
}

// A forward without it kept nothing for a backward.
inline void check_saved(const char* op, torch::autograd::AutogradContext* ctx) {
  TORCH_CHECK(ctx->saved_data["saved"].toBool(), op,
              ": backward needs the winner mask, but the forward ran with save_winner_mask=False");
}

// Sizes [H, W] of a tensor, for a backward that does not keep the tensor.
inline void save_size(torch::autograd::AutogradContext* ctx, const at::Tensor& tensor) {
  ctx->saved_data["size"] = c10::SymIntArrayRef({tensor.sym_size(2), tensor.sym_size(3)});
}

inline std::vector<c10::SymInt> saved_size(torch::autograd::AutogradContext* ctx) {
  return ctx->saved_data["size"].toSymIntVector();
}

}  // namespace dlfast
