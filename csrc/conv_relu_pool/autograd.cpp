// What stands above the backends: the public operator as a composite, its autograd and its autocast.
//
// Everything here takes symbolic sizes, so that torch.compile and torch.export trace through it.
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "conv_relu_pool/measure_block.h"
#include "conv_relu_pool/op.h"
#include "conv_relu_pool/op_geometry.h"

namespace dlfast {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Triple = std::tuple<Tensor, Tensor, Tensor>;
using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                    IntArrayRef, IntArrayRef, IntArrayRef, int64_t,
                                                    OptionalName, OptionalName, IntArrayRef, IntArrayRef,
                                                    IntArrayRef, bool, bool);
using BackwardSignature = Triple(const Tensor&, const Tensor&, const Tensor&, const Tensor&, IntArrayRef,
                                 IntArrayRef, IntArrayRef, int64_t, OptionalName, OptionalName, IntArrayRef,
                                 IntArrayRef, IntArrayRef, bool, std::array<bool, 3>);
using ExpandSignature = Tensor(const Tensor&, const Tensor&, SymIntArrayRef, OptionalName, OptionalName,
                               IntArrayRef, IntArrayRef, IntArrayRef, bool);
using TransposeSignature = Tensor(const Tensor&, const Tensor&, OptionalName, OptionalName, IntArrayRef,
                                  IntArrayRef, IntArrayRef, bool);
using EpilogueSignature = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, OptionalName,
                                                     OptionalName, IntArrayRef, IntArrayRef, IntArrayRef,
                                                     bool, bool);

std::tuple<Tensor, Tensor> call_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                        const Geometry& g, bool save_code) {
  static const auto op = find<ForwardSignature>("dlfast::_conv_relu_pool2d");
  return op.call(input, weight, bias, g.stride, g.padding, g.dilation, g.groups, g.activation, g.pool,
                 g.pool_size, g.pool_stride, g.pool_padding, g.ceil_mode, save_code);
}

Triple call_backward(const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& code,
                     const Geometry& g, std::array<bool, 3> mask) {
  static const auto op = find<BackwardSignature>("dlfast::_conv_relu_pool2d_backward");
  return op.call(grad, input, weight, code, g.stride, g.padding, g.dilation, g.groups, g.activation, g.pool,
                 g.pool_size, g.pool_stride, g.pool_padding, g.ceil_mode, mask);
}

std::tuple<Tensor, Tensor> call_epilogue(const Tensor& input, const OptionalTensor& bias, const Geometry& g,
                                         bool save_code) {
  static const auto op = find<EpilogueSignature>("dlfast::_relu_pool2d");
  return op.call(input, bias, g.activation, g.pool, g.pool_size, g.pool_stride, g.pool_padding, g.ceil_mode,
                 save_code);
}

Tensor call_expand(const Tensor& grad, const Tensor& code, SymIntArrayRef input_size, const Geometry& g) {
  static const auto op = find<ExpandSignature>("dlfast::_relu_pool2d_backward");
  return op.call(grad, code, input_size, g.activation, g.pool, g.pool_size, g.pool_stride, g.pool_padding,
                 g.ceil_mode);
}

Tensor call_transpose(const Tensor& grad, const Tensor& code, const Geometry& g) {
  static const auto op = find<TransposeSignature>("dlfast::_relu_pool2d_transpose");
  return op.call(grad, code, g.activation, g.pool, g.pool_size, g.pool_stride, g.pool_padding, g.ceil_mode);
}

Geometry pooling_only(OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                      IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode) {
  return Geometry::of({1, 1}, {0, 0}, {1, 1}, 1, activation, pool, pool_size, pool_stride, pool_padding,
                      ceil_mode);
}

// What backward is given as the code: without pooling ReLU's own output tells where gradient passes.
const Tensor& code_of(const Geometry& g, const Tensor& output, const Tensor& code) {
  return !g.pool && g.activation ? output : code;
}

void check_layout(const char* name, const Tensor& tensor) {
  TORCH_CHECK(tensor.layout() == at::kStrided, "conv_relu_pool2d: ", name,
              " must be a dense tensor, got layout ", tensor.layout());
}

// A bias that is not there is no input that autograd counts.
bool bias_needs_grad(AutogradContext* ctx, size_t index) {
  return ctx->saved_data["biased"].toBool() && ctx->needs_input_grad(index);
}

Tensor defined_if(bool wanted, const Tensor& tensor) {
  return wanted ? tensor : Tensor();
}

// Sizes [H, W] of the convolution output.
std::vector<SymInt> convolution_size(const Tensor& input, const Tensor& weight, const Geometry& g) {
  std::vector<SymInt> size;
  for (const int axis : {0, 1}) {
    const SymInt reach = g.dilation[axis] * (weight.sym_size(2 + axis) - 1) + 1;
    size.push_back((input.sym_size(2 + axis) + g.padding[axis] * 2 - reach) / g.stride[axis] + 1);
  }
  return size;
}

std::vector<SymInt> symbolic(const Geometry::Pair& pair) {
  return {pair[0], pair[1]};
}

// ---- Derivatives --------------------------------------------------------------------------------------

struct ConvReluPool : torch::autograd::Function<ConvReluPool> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                               const OptionalTensor& bias, const Geometry& g, bool save_code) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, code] = call_forward(input, weight, bias, g, save_code);
    ctx->save_for_backward({input, weight, code_of(g, output, code)});
    ctx->mark_non_differentiable({code});
    ctx->set_materialize_grads(false);
    ctx->saved_data["saved"] = save_code;
    ctx->saved_data["biased"] = bias && bias->defined();
    g.save(ctx);
    return {output, code};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(5);
    TORCH_CHECK(ctx->saved_data["saved"].toBool(),
                "conv_relu_pool2d: backward needs the code, but the forward ran with save_code=False");
    const Geometry g = Geometry::restore(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 3> mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                      bias_needs_grad(ctx, 2)};
    const auto [grad_input, grad_weight, grad_bias] =
        call_backward(grads[0], saved[0], saved[1], saved[2], g, mask);
    return {defined_if(mask[0], grad_input),
            defined_if(mask[1], grad_weight),
            defined_if(mask[2], grad_bias),
            {},
            {}};
  }
};

struct Epilogue : torch::autograd::Function<Epilogue> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& bias,
                               const Geometry& g, bool save_code) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, code] = call_epilogue(input, bias, g, save_code);
    ctx->save_for_backward({code_of(g, output, code)});
    ctx->mark_non_differentiable({code});
    ctx->set_materialize_grads(false);
    ctx->saved_data["saved"] = save_code;
    ctx->saved_data["biased"] = bias && bias->defined();
    ctx->saved_data["size"] = SymIntArrayRef({input.sym_size(2), input.sym_size(3)});
    g.save(ctx);
    return {output, code};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(4);
    TORCH_CHECK(ctx->saved_data["saved"].toBool(),
                "relu_pool2d: backward needs the code, but the forward ran with save_code=False");
    const std::vector<SymInt> size = ctx->saved_data["size"].toSymIntVector();
    const Tensor grad = call_expand(grads[0], ctx->get_saved_variables()[0], size, Geometry::restore(ctx));
    const Tensor grad_bias = bias_needs_grad(ctx, 1) ? grad.sum({0, 2, 3}) : Tensor();
    return {defined_if(ctx->needs_input_grad(0), grad), grad_bias, {}, {}};
  }
};

// The gradient is linear in grad_output for a given code, so these two are each other's derivative.
struct Expand : torch::autograd::Function<Expand> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& code,
                        const std::vector<SymInt>& input_size, const Geometry& g) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({code});
    g.save(ctx);
    return call_expand(grad, code, input_size, g);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {call_transpose(grads[0], ctx->get_saved_variables()[0], Geometry::restore(ctx)), {}, {}, {}};
  }
};

struct Transpose : torch::autograd::Function<Transpose> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& code, const Geometry& g) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({code});
    ctx->saved_data["size"] = SymIntArrayRef({grad.sym_size(2), grad.sym_size(3)});
    g.save(ctx);
    return call_transpose(grad, code, g);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const std::vector<SymInt> size = ctx->saved_data["size"].toSymIntVector();
    return {call_expand(grads[0], ctx->get_saved_variables()[0], size, Geometry::restore(ctx)), {}, {}};
  }
};

// ---- Kernels of the Autograd key ----------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward_autograd(const Tensor& input, const Tensor& weight,
                                            const OptionalTensor& bias, IntArrayRef stride,
                                            IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                            OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                                            IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode,
                                            bool save_code) {
  const Geometry g = Geometry::of(stride, padding, dilation, groups, activation, pool, pool_size, pool_stride,
                                  pool_padding, ceil_mode);
  const variable_list results = ConvReluPool::apply(input, weight, bias, g, save_code);
  return {results[0], results[1]};
}

Triple backward_autograd(const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& code,
                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                         OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                         IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode,
                         std::array<bool, 3> mask) {
  const Geometry g = Geometry::of(stride, padding, dilation, groups, activation, pool, pool_size, pool_stride,
                                  pool_padding, ceil_mode);
  const bool differentiate =
      at::GradMode::is_enabled() && (grad.requires_grad() || input.requires_grad() || weight.requires_grad());
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad, input, weight, code, g, mask);
  }
  // Second derivatives go through pieces that PyTorch or we can differentiate again.
  const Tensor dense = call_expand(grad, code.detach(), convolution_size(input, weight, g), g);
  const auto [grad_input, grad_weight, grad_bias] = at::convolution_backward_symint(
      dense, input, weight, std::vector<SymInt>{weight.sym_size(0)}, symbolic(g.stride), symbolic(g.padding),
      symbolic(g.dilation), /*transposed=*/false, /*output_padding=*/symbolic({0, 0}), g.groups, mask);
  const auto or_nothing = [&](bool wanted, const Tensor& t) {
    return wanted ? t : at::empty({0}, input.options());
  };
  return {or_nothing(mask[0], grad_input), or_nothing(mask[1], grad_weight), or_nothing(mask[2], grad_bias)};
}

std::tuple<Tensor, Tensor> epilogue_autograd(const Tensor& input, const OptionalTensor& bias,
                                             OptionalName activation, OptionalName pool,
                                             IntArrayRef pool_size, IntArrayRef pool_stride,
                                             IntArrayRef pool_padding, bool ceil_mode, bool save_code) {
  const Geometry g = pooling_only(activation, pool, pool_size, pool_stride, pool_padding, ceil_mode);
  const variable_list results = Epilogue::apply(input, bias, g, save_code);
  return {results[0], results[1]};
}

Tensor expand_autograd(const Tensor& grad, const Tensor& code, SymIntArrayRef input_size,
                       OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                       IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode) {
  const Geometry g = pooling_only(activation, pool, pool_size, pool_stride, pool_padding, ceil_mode);
  return Expand::apply(grad, code, std::vector<SymInt>(input_size.begin(), input_size.end()), g);
}

Tensor transpose_autograd(const Tensor& grad, const Tensor& code, OptionalName activation, OptionalName pool,
                          IntArrayRef pool_size, IntArrayRef pool_stride, IntArrayRef pool_padding,
                          bool ceil_mode) {
  return Transpose::apply(grad, code,
                          pooling_only(activation, pool, pool_size, pool_stride, pool_padding, ceil_mode));
}

// ---- The public operator ------------------------------------------------------------------------------

Tensor conv_relu_pool2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                        OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                        at::OptionalIntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode) {
  const Geometry g =
      Geometry::of(stride, padding, dilation, groups, activation, pool, pool_size,
                   pool_stride ? IntArrayRef(*pool_stride) : pool_size, pool_padding, ceil_mode);
  // Before dispatch, which would only say that there is no such kernel.
  check_layout("input", input);
  check_layout("weight", weight);
  const bool save_code = at::GradMode::is_enabled() && (input.requires_grad() || weight.requires_grad() ||
                                                        (bias && bias->defined() && bias->requires_grad()));
  if (input.dim() == 3)
    return std::get<0>(call_forward(input.unsqueeze(0), weight, bias, g, save_code)).squeeze(0);
  const PoolArgs pooling{g.activation, g.pool, g.pool_size, g.pool_stride, g.pool_padding, g.ceil_mode};
  if (is_plain_convolution(input, weight, {g.stride, g.padding, g.dilation, g.groups}, pooling, save_code)) {
    return at::conv2d(input, weight, bias, g.stride, g.padding, g.dilation, g.groups);
  }
#ifdef DLFAST_WITH_CUDA
  const auto ours = [&](const Tensor& x, const Tensor& w, const OptionalTensor& b) {
    return std::get<0>(call_forward(x, w, b, g, save_code));
  };
  if (eager_is_faster(input, weight, bias, g, save_code, ours)) return eager_block(input, weight, bias, g);
#endif
  return std::get<0>(call_forward(input, weight, bias, g, save_code));
}

// As autocast does for conv2d: run in the lower precision.
template <c10::DeviceType device, c10::DispatchKey key>
Tensor conv_relu_pool2d_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                 int64_t groups, OptionalName activation, OptionalName pool,
                                 IntArrayRef pool_size, at::OptionalIntArrayRef pool_stride,
                                 IntArrayRef pool_padding, bool ceil_mode) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  using Signature =
      Tensor(const Tensor&, const Tensor&, const OptionalTensor&, IntArrayRef, IntArrayRef, IntArrayRef,
             int64_t, OptionalName, OptionalName, IntArrayRef, at::OptionalIntArrayRef, IntArrayRef, bool);
  static const auto op = find<Signature>("dlfast::conv_relu_pool2d");
  return op.call(cast(input), cast(weight), bias ? OptionalTensor(cast(*bias)) : bias, stride, padding,
                 dilation, groups, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, CompositeImplicitAutograd, m) {
  m.impl("conv_relu_pool2d", conv_relu_pool2d);
}

TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_conv_relu_pool2d", forward_autograd);
  m.impl("_conv_relu_pool2d_backward", backward_autograd);
  m.impl("_relu_pool2d", epilogue_autograd);
  m.impl("_relu_pool2d_backward", expand_autograd);
  m.impl("_relu_pool2d_transpose", transpose_autograd);
}

TORCH_LIBRARY_IMPL(dlfast, AutocastCPU, m) {
  m.impl("conv_relu_pool2d", conv_relu_pool2d_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(dlfast, AutocastCUDA, m) {
  m.impl("conv_relu_pool2d", conv_relu_pool2d_autocast<c10::kCUDA, c10::DispatchKey::Autocast>);
}

}  // namespace dlfast
