// Derivatives of batch normalisation with activation and pooling.
#include "core/autograd.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "pool/autograd.h"

namespace dlfast {
namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Quadruple call_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& mean, const OptionalTensor& var, double eps,
                       const PoolOptions& options, bool save_winner_mask) {
  static const Operator<Quadruple(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&, double, const PoolOptions&,
                                  bool)>
      op("dlfast::_batch_norm_relu_pool2d");
  return op(input, weight, bias, mean, var, eps, options, save_winner_mask);
}

Gradients call_backward(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                        const Tensor& winner_mask, bool batch_statistics, double eps,
                        const PoolOptions& options, Mask mask) {
  static const Operator<Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                  const Tensor&, const Tensor&, const Tensor&, bool, double,
                                  const PoolOptions&, Mask)>
      op("dlfast::_batch_norm_relu_pool2d_backward");
  return op(grad, input, weight, bias, mean, var, winner_mask, batch_statistics, eps, options, mask);
}

Tensor or_undefined(const OptionalTensor& tensor) {
  return is_given(tensor) ? *tensor : Tensor();
}

OptionalTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

bool asks(const Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}

struct BatchNormReluPool : torch::autograd::Function<BatchNormReluPool> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& mean,
                               const OptionalTensor& var, double eps, const PoolOptions& options,
                               bool save_winner_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, winner_mask, batch_mean, batch_var] =
        call_forward(input, weight, bias, mean, var, eps, options, save_winner_mask);
    const bool fixed = is_given(mean);
    ctx->save_for_backward({input, or_undefined(weight), or_undefined(bias), fixed ? *mean : batch_mean,
                            fixed ? *var : batch_var, winner_mask});
    ctx->mark_non_differentiable({winner_mask, batch_mean, batch_var});
    ctx->set_materialize_grads(false);
    ctx->saved_data["fixed"] = fixed;
    ctx->saved_data["saved"] = save_winner_mask;
    ctx->saved_data["eps"] = eps;
    save_options(ctx, options);
    return {output, winner_mask, batch_mean, batch_var};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    constexpr int kOthers = 5;  // mean, var, eps, options, save_winner_mask
    if (!grads[0].defined()) return variable_list(3 + kOthers);
    check_saved("batch_norm_relu_pool2d", ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Mask mask = {ctx->needs_input_grad(0), asks(saved[1]), asks(saved[2])};
    const Gradients gradients = call_backward(
        grads[0], saved[0], or_none(saved[1]), or_none(saved[2]), saved[3], saved[4], saved[5],
        !ctx->saved_data["fixed"].toBool(), ctx->saved_data["eps"].toDouble(), saved_pool_options(ctx), mask);
    return gradient_list(mask, gradients, kOthers);
  }
};

Quadruple batch_norm_relu_pool2d(const Tensor& input, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& mean,
                                 const OptionalTensor& var, double eps, const PoolOptions& options,
                                 bool save_winner_mask) {
  const variable_list out =
      BatchNormReluPool::apply(input, weight, bias, mean, var, eps, options, save_winner_mask);
  return {out[0], out[1], out[2], out[3]};
}

// The gradient before the activation, from pieces that PyTorch or we can differentiate again.
Tensor gradient_before_activation(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                  const Tensor& winner_mask, double eps, const PoolOptions& options) {
  const std::vector<SymInt> size = {input.sym_size(2), input.sym_size(3)};
  if (options.pool == Pool::max) return call_expand(grad, winner_mask.detach(), size, options);
  PoolOptions average = options;
  average.activation = Activation::none;
  const Tensor dense =
      options.pool == Pool::avg ? call_expand(grad, winner_mask.detach(), size, average) : grad;
  if (options.activation == Activation::none) return dense;
  const at::NoGradGuard no_grad;
  const Tensor y = at::batch_norm(input, weight, bias, mean, var, /*training=*/false, 0, eps, false);
  const Tensor dead = y.le(0);
  const at::AutoGradMode grad_again(true);
  return dense.masked_fill(dead, 0);
}

Gradients batch_norm_relu_pool2d_backward(const Tensor& grad, const Tensor& input,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const Tensor& mean, const Tensor& var, const Tensor& winner_mask,
                                          bool batch_statistics, double eps, const PoolOptions& options,
                                          Mask mask) {
  const bool differentiate =
      at::GradMode::is_enabled() && (asks(grad) || asks(input) || asks(or_undefined(weight)));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad, input, weight, bias, mean, var, winner_mask, batch_statistics, eps, options,
                         mask);
  }
  const Tensor dense =
      gradient_before_activation(grad, input, weight, bias, mean, var, winner_mask, eps, options);
  const Tensor inverse = (var + eps).rsqrt();
  return masked(mask,
                at::native_batch_norm_backward(dense, input, weight, mean, var, mean, inverse,
                                               batch_statistics, eps, mask),
                input);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_batch_norm_relu_pool2d", kernel_of<"batch_norm_relu_pool2d", batch_norm_relu_pool2d>);
  m.impl("_batch_norm_relu_pool2d_backward",
         kernel_of<"batch_norm_relu_pool2d_backward", batch_norm_relu_pool2d_backward>);
}

}  // namespace dlfast
