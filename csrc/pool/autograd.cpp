// Derivatives of activation and pooling, of any order.
#include "pool/autograd.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "core/autograd.h"

namespace dlfast {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor call_expand(const Tensor& grad, const Tensor& winner_mask, SymIntArrayRef input_size,
                   const PoolOptions& options) {
  static const Operator<Tensor(const Tensor&, const Tensor&, SymIntArrayRef, const PoolOptions&)> op(
      "dlfast::_relu_pool2d_backward");
  return op(grad, winner_mask, input_size, options);
}

namespace {

std::tuple<Tensor, Tensor> call_forward(const Tensor& input, const OptionalTensor& bias,
                                        const PoolOptions& options, bool save_winner_mask) {
  static const Operator<std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const PoolOptions&,
                                                   bool)>
      op("dlfast::_relu_pool2d");
  return op(input, bias, options, save_winner_mask);
}

Tensor call_transpose(const Tensor& grad, const Tensor& winner_mask, const PoolOptions& options) {
  static const Operator<Tensor(const Tensor&, const Tensor&, const PoolOptions&)> op(
      "dlfast::_relu_pool2d_transpose");
  return op(grad, winner_mask, options);
}

struct ReluPool : torch::autograd::Function<ReluPool> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& bias,
                               const PoolOptions& options, bool save_winner_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, winner_mask] = call_forward(input, bias, options, save_winner_mask);
    ctx->save_for_backward({winner_mask_of(options, output, winner_mask)});
    ctx->mark_non_differentiable({winner_mask});
    ctx->set_materialize_grads(false);
    ctx->saved_data["saved"] = save_winner_mask;
    ctx->saved_data["biased"] = is_given(bias);
    save_size(ctx, input);
    save_options(ctx, options);
    return {output, winner_mask};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(4);
    check_saved("relu_pool2d", ctx);
    const Tensor grad =
        call_expand(grads[0], ctx->get_saved_variables()[0], saved_size(ctx), saved_pool_options(ctx));
    // A bias that is not there is no input that autograd counts.
    const bool bias = ctx->saved_data["biased"].toBool() && ctx->needs_input_grad(1);
    return {defined_if(ctx->needs_input_grad(0), grad), bias ? grad.sum({0, 2, 3}) : Tensor(), {}, {}};
  }
};

// The gradient is linear in grad_output for a given winner mask, so these two are each other's derivative.
struct Expand : torch::autograd::Function<Expand> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& winner_mask,
                        const std::vector<SymInt>& input_size, const PoolOptions& options) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({winner_mask});
    save_options(ctx, options);
    return call_expand(grad, winner_mask, input_size, options);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {call_transpose(grads[0], ctx->get_saved_variables()[0], saved_pool_options(ctx)), {}, {}, {}};
  }
};

struct Transpose : torch::autograd::Function<Transpose> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& winner_mask,
                        const PoolOptions& options) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({winner_mask});
    save_size(ctx, grad);
    save_options(ctx, options);
    return call_transpose(grad, winner_mask, options);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {call_expand(grads[0], ctx->get_saved_variables()[0], saved_size(ctx), saved_pool_options(ctx)),
            {},
            {}};
  }
};

std::tuple<Tensor, Tensor> relu_pool2d(const Tensor& input, const OptionalTensor& bias,
                                       const PoolOptions& options, bool save_winner_mask) {
  const variable_list results = ReluPool::apply(input, bias, options, save_winner_mask);
  return {results[0], results[1]};
}

Tensor relu_pool2d_backward(const Tensor& grad, const Tensor& winner_mask, SymIntArrayRef input_size,
                            const PoolOptions& options) {
  return Expand::apply(grad, winner_mask, std::vector<SymInt>(input_size.begin(), input_size.end()), options);
}

Tensor relu_pool2d_transpose(const Tensor& grad, const Tensor& winner_mask, const PoolOptions& options) {
  return Transpose::apply(grad, winner_mask, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_relu_pool2d", kernel_of<"relu_pool2d", relu_pool2d>);
  m.impl("_relu_pool2d_backward", kernel_of<"relu_pool2d_backward", relu_pool2d_backward>);
  m.impl("_relu_pool2d_transpose", kernel_of<"relu_pool2d_transpose", relu_pool2d_transpose>);
}

}  // namespace dlfast
