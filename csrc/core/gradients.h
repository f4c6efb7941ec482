// The three gradients of an operator with a weight and a bias, and which of them are wanted.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <tuple>

namespace dlfast {

using Mask = std::array<bool, 3>;  // which of grad_input, grad_weight and grad_bias are wanted
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline at::Tensor defined_if(bool wanted, const at::Tensor& tensor) {
  return wanted ? tensor : at::Tensor();
}

// As operators return them: an empty tensor where one is not there.
inline Gradients filled(const Gradients& grads, const at::Tensor& like) {
  const auto one = [&](const at::Tensor& grad) {
    return grad.defined() ? grad : at::empty({0}, like.options());
  };
  return {one(std::get<0>(grads)), one(std::get<1>(grads)), one(std::get<2>(grads))};
}

}  // namespace dlfast
