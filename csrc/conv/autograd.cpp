// What stands above the backends: the public operator as a composite, its autograd and its autocast.
//
// Everything here takes symbolic sizes, so that torch.compile and torch.export trace through it.
#include "core/autograd.h"

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "conv/eager.h"
#include "conv/heuristics.h"
#include "conv/measure_block.h"
#include "pool/autograd.h"

namespace dlfast {
namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor> call_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                        const BlockOptions& options, bool save_winner_mask,
                                        const ChosenAlgorithms& algorithms) {
  static const Operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                   const BlockOptions&, bool, const ChosenAlgorithms&)>
      op("dlfast::_conv_relu_pool2d");
  return op(input, weight, bias, options, save_winner_mask, algorithms);
}

Gradients call_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                        const Tensor& winner_mask, const BlockOptions& options, Mask mask,
                        const ChosenAlgorithms& algorithms) {
  static const Operator<Gradients(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  const BlockOptions&, Mask, const ChosenAlgorithms&)>
      op("dlfast::_conv_relu_pool2d_backward");
  return op(grad, input, weight, winner_mask, options, mask, algorithms);
}

void check_layout(const char* name, const Tensor& tensor) {
  TORCH_CHECK(tensor.layout() == at::kStrided, "conv_relu_pool2d: ", name,
              " must be a dense tensor, got layout ", tensor.layout());
}

// Sizes [H, W] of the convolution output.
std::vector<SymInt> convolution_size(const Tensor& input, const Tensor& weight, const ConvOptions& c) {
  std::vector<SymInt> size;
  for (const int axis : {0, 1}) {
    const SymInt reach = c.dilation[axis] * (weight.sym_size(2 + axis) - 1) + 1;
    size.push_back((input.sym_size(2 + axis) + c.padding[axis] * 2 - reach) / c.stride[axis] + 1);
  }
  return size;
}

std::vector<SymInt> symbolic(const int64_t (&pair)[2]) {
  return {pair[0], pair[1]};
}

// ---- Derivatives --------------------------------------------------------------------------------------

struct ConvReluPool : torch::autograd::Function<ConvReluPool> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                               const OptionalTensor& bias, const BlockOptions& options, bool save_winner_mask,
                               const ChosenAlgorithms& algorithms) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, winner_mask] = call_forward(input, weight, bias, options, save_winner_mask, algorithms);
    ctx->save_for_backward({input, weight, winner_mask_of(options.pool, output, winner_mask)});
    ctx->mark_non_differentiable({winner_mask});
    ctx->set_materialize_grads(false);
    ctx->saved_data["saved"] = save_winner_mask;
    ctx->saved_data["biased"] = is_given(bias);
    save_options(ctx, options);
    save_algorithms(ctx, algorithms);
    return {output, winner_mask};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    constexpr int kOthers = 3;  // options, save_winner_mask, algorithms
    if (!grads[0].defined()) return variable_list(3 + kOthers);
    check_saved("conv_relu_pool2d", ctx);
    const variable_list saved = ctx->get_saved_variables();
    // A bias that is not there is no input that autograd counts.
    const bool needs_bias = ctx->saved_data["biased"].toBool() && ctx->needs_input_grad(2);
    const Mask mask = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), needs_bias};
    const Gradients gradients = call_backward(grads[0], saved[0], saved[1], saved[2],
                                              saved_block_options(ctx), mask, saved_algorithms(ctx));
    return gradient_list(mask, gradients, kOthers);
  }
};

std::tuple<Tensor, Tensor> forward_autograd(const Tensor& input, const Tensor& weight,
                                            const OptionalTensor& bias, const BlockOptions& options,
                                            bool save_winner_mask, const ChosenAlgorithms& algorithms) {
  const variable_list results =
      ConvReluPool::apply(input, weight, bias, options, save_winner_mask, algorithms);
  return {results[0], results[1]};
}

Gradients backward_autograd(const Tensor& grad, const Tensor& input, const Tensor& weight,
                            const Tensor& winner_mask, const BlockOptions& options, Mask mask,
                            const ChosenAlgorithms& algorithms) {
  const bool differentiate =
      at::GradMode::is_enabled() && (grad.requires_grad() || input.requires_grad() || weight.requires_grad());
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad, input, weight, winner_mask, options, mask, algorithms);
  }
  // Second derivatives go through pieces that PyTorch or we can differentiate again.
  const ConvOptions& c = options.conv;
  const Tensor dense =
      call_expand(grad, winner_mask.detach(), convolution_size(input, weight, c), options.pool);
  return masked(mask,
                at::convolution_backward_symint(dense, input, weight, std::vector<SymInt>{weight.sym_size(0)},
                                                symbolic(c.stride), symbolic(c.padding), symbolic(c.dilation),
                                                /*transposed=*/false, /*output_padding=*/symbolic({0, 0}),
                                                c.groups, mask),
                input);
}

// ---- The public operator ------------------------------------------------------------------------------

Tensor conv_relu_pool2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const PublicOptions& options) {
  // Before dispatch, which would only say that there is no such kernel.
  check_layout("input", input);
  check_layout("weight", weight);
  const bool save_winner_mask =
      at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || (is_given(bias) && bias->requires_grad()));
  const bool batched = input.dim() != 3;
  const Tensor x = batched ? input : input.unsqueeze(0);
  const BlockChoice choice = choose_block(x, weight, options, save_winner_mask);
  if (choice.is_plain_convolution) return eager_block(input, weight, bias, options);
#ifdef DLFAST_WITH_CUDA
  const auto ours = [&](const Tensor& i, const Tensor& w, const OptionalTensor& b) {
    return std::get<0>(call_forward(i, w, b, options, save_winner_mask, choice.algorithms));
  };
  if (batched && eager_is_faster(input, weight, bias, options, save_winner_mask, ours)) {
    return eager_block(input, weight, bias, options);
  }
#endif
  const Tensor y = std::get<0>(call_forward(x, weight, bias, options, save_winner_mask, choice.algorithms));
  return batched ? y : y.squeeze(0);
}

// As autocast does for conv2d: run in the lower precision.
template <c10::DeviceType device, c10::DispatchKey key>
Tensor conv_relu_pool2d_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 const PublicOptions& options) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  static const Operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const PublicOptions&)> op(
      "dlfast::conv_relu_pool2d");
  return op(cast(input), cast(weight), bias ? OptionalTensor(cast(*bias)) : bias, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, CompositeImplicitAutograd, m) {
  m.impl("conv_relu_pool2d", kernel_of<"conv_relu_pool2d", conv_relu_pool2d>);
}

TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_conv_relu_pool2d", kernel_of<"conv_relu_pool2d", forward_autograd>);
  m.impl("_conv_relu_pool2d_backward", kernel_of<"conv_relu_pool2d_backward", backward_autograd>);
}

TORCH_LIBRARY_IMPL(dlfast, AutocastCPU, m) {
  m.impl("conv_relu_pool2d",
         kernel_of<"conv_relu_pool2d", conv_relu_pool2d_autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>>);
}

TORCH_LIBRARY_IMPL(dlfast, AutocastCUDA, m) {
  m.impl("conv_relu_pool2d",
         kernel_of<"conv_relu_pool2d", conv_relu_pool2d_autocast<c10::kCUDA, c10::DispatchKey::Autocast>>);
}

}  // namespace dlfast
