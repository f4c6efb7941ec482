// Derivatives of batch normalisation with activation and pooling.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

namespace dlfast {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using OptionalName = std::optional<std::string_view>;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The arguments that are no tensors.
struct Options {
  double eps;
  OptionalName activation, pool;
  std::vector<int64_t> size, stride, padding;
  bool ceil_mode;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["activation"] = activation.has_value();
    ctx->saved_data["pool"] = static_cast<int64_t>(!pool ? 0 : *pool == "avg" ? 2 : 1);
    ctx->saved_data["size"] = size;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["ceil_mode"] = ceil_mode;
  }
  static Options restore(AutogradContext* ctx) {
    const int64_t pool = ctx->saved_data["pool"].toInt();
    const OptionalName none, max = "max", avg = "avg", relu = "relu";
    return {ctx->saved_data["eps"].toDouble(),        ctx->saved_data["activation"].toBool() ? relu : none,
            pool == 0 ? none : pool == 1 ? max : avg, ctx->saved_data["size"].toIntVector(),
            ctx->saved_data["stride"].toIntVector(),  ctx->saved_data["padding"].toIntVector(),
            ctx->saved_data["ceil_mode"].toBool()};
  }
};

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ForwardSignature = Quadruple(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&, double, OptionalName,
                                   OptionalName, IntArrayRef, IntArrayRef, IntArrayRef, bool, bool);
using BackwardSignature = Triple(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                 const Tensor&, const Tensor&, const Tensor&, bool, double, OptionalName,
                                 OptionalName, IntArrayRef, IntArrayRef, IntArrayRef, bool,
                                 std::array<bool, 3>);
using ExpandSignature = Tensor(const Tensor&, const Tensor&, SymIntArrayRef, OptionalName, OptionalName,
                               IntArrayRef, IntArrayRef, IntArrayRef, bool);

Quadruple call_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& mean, const OptionalTensor& var, const Options& o,
                       bool save_code) {
  static const auto op = find<ForwardSignature>("dlfast::_batch_norm_relu_pool2d");
  return op.call(input, weight, bias, mean, var, o.eps, o.activation, o.pool, o.size, o.stride, o.padding,
                 o.ceil_mode, save_code);
}

Triple call_backward(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                     const OptionalTensor& bias, const Tensor& mean, const Tensor& var, const Tensor& code,
                     bool batch_statistics, const Options& o, std::array<bool, 3> mask) {
  static const auto op = find<BackwardSignature>("dlfast::_batch_norm_relu_pool2d_backward");
  return op.call(grad, input, weight, bias, mean, var, code, batch_statistics, o.eps, o.activation, o.pool,
                 o.size, o.stride, o.padding, o.ceil_mode, mask);
}

Tensor call_expand(const Tensor& grad, const Tensor& code, SymIntArrayRef input_size, OptionalName activation,
                   const Options& o) {
  static const auto op = find<ExpandSignature>("dlfast::_relu_pool2d_backward");
  return op.call(grad, code, input_size, activation, o.pool, o.size, o.stride, o.padding, o.ceil_mode);
}

bool is_given(const OptionalTensor& tensor) {
  return tensor && tensor->defined();
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
                               const OptionalTensor& var, const Options& o, bool save_code) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, code, batch_mean, batch_var] = call_forward(input, weight, bias, mean, var, o, save_code);
    const bool fixed = is_given(mean);
    ctx->save_for_backward({input, or_undefined(weight), or_undefined(bias), fixed ? *mean : batch_mean,
                            fixed ? *var : batch_var, code});
    ctx->mark_non_differentiable({code, batch_mean, batch_var});
    ctx->set_materialize_grads(false);
    ctx->saved_data["fixed"] = fixed;
    // The inputs that autograd counts are the tensors that are there.
    ctx->saved_data["weight"] = static_cast<int64_t>(is_given(weight) ? 1 : 0);
    ctx->saved_data["bias"] = static_cast<int64_t>(is_given(bias) ? 1 : 0);
    ctx->saved_data["saved"] = save_code;
    o.save(ctx);
    return {output, code, batch_mean, batch_var};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(7);
    TORCH_CHECK(ctx->saved_data["saved"].toBool(),
                "batch_norm_relu_pool2d: backward needs the code, but the forward ran with save_code=False");
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), asks(saved[1]), asks(saved[2])};
    const auto [grad_input, grad_weight, grad_bias] =
        call_backward(grads[0], saved[0], or_none(saved[1]), or_none(saved[2]), saved[3], saved[4], saved[5],
                      !ctx->saved_data["fixed"].toBool(), Options::restore(ctx), mask);
    return {mask[0] ? grad_input : Tensor(),
            mask[1] ? grad_weight : Tensor(),
            mask[2] ? grad_bias : Tensor(),
            {},
            {},
            {},
            {}};
  }
};

Quadruple forward_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& mean, const OptionalTensor& var, double eps,
                           OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                           IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode,
                           bool save_code) {
  const Options o = {eps,      activation, pool, pool_size.vec(), pool_stride.vec(), pool_padding.vec(),
                     ceil_mode};
  const variable_list out = BatchNormReluPool::apply(input, weight, bias, mean, var, o, save_code);
  return {out[0], out[1], out[2], out[3]};
}

// The gradient before the activation, from pieces that PyTorch or we can differentiate again.
Tensor gradient_before_activation(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                  const Tensor& code, const Options& o) {
  const std::vector<SymInt> size = {input.sym_size(2), input.sym_size(3)};
  if (o.pool && *o.pool == "max") return call_expand(grad, code.detach(), size, o.activation, o);
  const Tensor dense = o.pool ? call_expand(grad, code.detach(), size, std::nullopt, o) : grad;
  if (!o.activation) return dense;
  const at::NoGradGuard no_grad;
  const Tensor y = at::batch_norm(input, weight, bias, mean, var, /*training=*/false, 0, o.eps, false);
  const Tensor dead = y.le(0);
  const at::AutoGradMode grad_again(true);
  return dense.masked_fill(dead, 0);
}

Triple backward_autograd(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                         const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                         const Tensor& code, bool batch_statistics, double eps, OptionalName activation,
                         OptionalName pool, IntArrayRef pool_size, IntArrayRef pool_stride,
                         IntArrayRef pool_padding, bool ceil_mode, std::array<bool, 3> mask) {
  const Options o = {eps,      activation, pool, pool_size.vec(), pool_stride.vec(), pool_padding.vec(),
                     ceil_mode};
  const bool differentiate =
      at::GradMode::is_enabled() && (asks(grad) || asks(input) || asks(or_undefined(weight)));
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad, input, weight, bias, mean, var, code, batch_statistics, o, mask);
  }
  const Tensor dense = gradient_before_activation(grad, input, weight, bias, mean, var, code, o);
  const Tensor inverse = (var + eps).rsqrt();
  const auto [grad_input, grad_weight, grad_bias] = at::native_batch_norm_backward(
      dense, input, weight, mean, var, mean, inverse, batch_statistics, eps, mask);
  const auto or_nothing = [&](bool wanted, const Tensor& t) {
    return wanted ? t : at::empty({0}, input.options());
  };
  return {or_nothing(mask[0], grad_input), or_nothing(mask[1], grad_weight), or_nothing(mask[2], grad_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_batch_norm_relu_pool2d", forward_autograd);
  m.impl("_batch_norm_relu_pool2d_backward", backward_autograd);
}

}  // namespace dlfast
