// Derivatives of activation and pooling, of any order.
#include "pool/autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/node.h"
#include "core/operator.h"
#include "core/plain.h"
#include "pool/op.h"

namespace dlfast {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

Tensor call_expand(const Tensor& grad, const Tensor& winner_mask, SymIntArrayRef input_size,
                   const PoolOptions& options) {
  static const Operator<Tensor(const Tensor&, const Tensor&, SymIntArrayRef, const PoolOptions&)> op(
      "dlfast::_relu_pool2d_backward");
  return op(grad, winner_mask, input_size, options);
}

namespace {

using Forward = std::tuple<Tensor, Tensor>;  // output, winner mask

Forward call_forward(const Tensor& input, const OptionalTensor& bias, const PoolOptions& options,
                     bool save_winner_mask) {
  static const Operator<Forward(const Tensor&, const OptionalTensor&, const PoolOptions&, bool)> op(
      "dlfast::_relu_pool2d");
  return op(input, bias, options, save_winner_mask);
}

Tensor call_transpose(const Tensor& grad, const Tensor& winner_mask, const PoolOptions& options) {
  static const Operator<Tensor(const Tensor&, const Tensor&, const PoolOptions&)> op(
      "dlfast::_relu_pool2d_transpose");
  return op(grad, winner_mask, options);
}

std::vector<SymInt> size_of(const Tensor& tensor) {
  return {tensor.sym_size(2), tensor.sym_size(3)};
}

struct ReluPoolBackward : torch::autograd::Node {
  SavedVariable winner_mask;
  std::vector<SymInt> size;  // [H, W] of what was pooled
  PoolOptions options;
  bool biased, has_winner_mask;

  std::string name() const override { return "ReluPoolBackward"; }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    winner_mask.reset_data();
  }
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(2);
    check_saved("relu_pool2d", has_winner_mask);
    const Tensor grad = call_expand(grads[0], winner_mask.unpack(getptr()), size, options);
    // A bias that is not there is no input that autograd counts.
    return {defined_if(task_should_compute_output(0), grad),
            biased && task_should_compute_output(1) ? grad.sum({0, 2, 3}) : Tensor()};
  }
};

// The gradient is linear in grad_output for a given winner mask: to expand it and the transpose of that are
// each other's derivative.
struct LinearBackward : torch::autograd::Node {
  SavedVariable winner_mask;
  std::vector<SymInt> size;  // [H, W] of what the transpose was given
  PoolOptions options;
  bool of_expand;

  std::string name() const override {
    return of_expand ? "ReluPoolExpandBackward" : "ReluPoolTransposeBackward";
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    winner_mask.reset_data();
  }
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(1);
    return {of_expand ? call_transpose(grads[0], winner_mask.unpack(), options)
                      : call_expand(grads[0], winner_mask.unpack(), size, options)};
  }
};

template <typename Run>
Tensor recorded(const Tensor& grad, const Tensor& winner_mask, const PoolOptions& options, bool of_expand,
                const Run& run) {
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return run();
  };
  if (!records(grad)) return below();
  const auto node = make_node<LinearBackward>(grad);
  node->winner_mask = saved(winner_mask);
  if (!of_expand) node->size = size_of(grad);
  node->options = options;
  node->of_expand = of_expand;
  Tensor result = below();
  set_history(result, node);
  completed(node);
  return result;
}

Forward relu_pool2d(const Tensor& input, const OptionalTensor& bias, const PoolOptions& options,
                    bool save_winner_mask) {
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(input, bias, options, save_winner_mask);
  };
  if (!records(input, bias)) return below();
  const auto node = make_node<ReluPoolBackward>(input, bias);
  node->size = size_of(input);
  node->options = options;
  node->biased = is_given(bias);
  node->has_winner_mask = save_winner_mask;
  Forward result = below();
  const auto& [output, winner_mask] = result;
  set_history(output, node);
  node->winner_mask = saved_winner_mask(options, output, winner_mask);
  completed(node);
  return result;
}

Tensor relu_pool2d_backward(const Tensor& grad, const Tensor& winner_mask, SymIntArrayRef input_size,
                            const PoolOptions& options) {
  return recorded(grad, winner_mask, options, /*of_expand=*/true,
                  [&] { return call_expand(grad, winner_mask, input_size, options); });
}

Tensor relu_pool2d_transpose(const Tensor& grad, const Tensor& winner_mask, const PoolOptions& options) {
  return recorded(grad, winner_mask, options, /*of_expand=*/false,
                  [&] { return call_transpose(grad, winner_mask, options); });
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_relu_pool2d", kernel_of<"relu_pool2d", relu_pool2d>);
  m.impl("_relu_pool2d_backward", kernel_of<"relu_pool2d_backward", relu_pool2d_backward>);
  m.impl("_relu_pool2d_transpose", kernel_of<"relu_pool2d_transpose", relu_pool2d_transpose>);
}

}  // namespace dlfast
