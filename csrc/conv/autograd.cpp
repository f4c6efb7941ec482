// What stands above the backends: the public operator as a composite, its autograd and its autocast.
//
// Everything here takes symbolic sizes, so that torch.compile and torch.export trace through it.
#include "conv/autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "conv/eager.h"
#include "conv/heuristics.h"
#include "conv/measure_block.h"
#include "conv/op.h"
#include "core/autocast.h"
#include "core/node.h"
#include "core/operator.h"
#include "core/plain.h"
#include "pool/autograd.h"

namespace dlfast {
namespace {

using at::Tensor;
using c10::SymInt;
using Forward = std::tuple<Tensor, Tensor>;  // output, winner mask

Forward call_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                     const BlockOptions& options, bool save_winner_mask, const ChosenAlgorithms& algorithms) {
  static const Operator<Forward(const Tensor&, const Tensor&, const OptionalTensor&, const BlockOptions&,
                                bool, const ChosenAlgorithms&)>
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

}  // namespace

Gradients conv_gradients(const Tensor& grad, const Tensor& input, const Tensor& weight,
                         const Tensor& winner_mask, const BlockOptions& options, Mask mask,
                         const ChosenAlgorithms& algorithms) {
  if (!records(grad, input, weight)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return are_plain(input, grad, weight, winner_mask)
               ? convolve_block_backward(grad, input, weight, winner_mask, options, mask, algorithms)
               : call_backward(grad, input, weight, winner_mask, options, mask, algorithms);
  }
  // Second derivatives go through pieces that PyTorch or we can differentiate again.
  const ConvOptions& c = options.conv;
  const Tensor dense =
      call_expand(grad, winner_mask.detach(), convolution_size(input, weight, c), options.pool);
  return at::convolution_backward_symint(dense, input, weight, std::vector<SymInt>{weight.sym_size(0)},
                                         symbolic(c.stride), symbolic(c.padding), symbolic(c.dilation),
                                         /*transposed=*/false, /*output_padding=*/symbolic({0, 0}), c.groups,
                                         mask);
}

namespace {

struct ConvReluPoolBackward : torch::autograd::Node {
  SavedVariable input, weight, winner_mask;
  BlockOptions options;
  ChosenAlgorithms algorithms;
  bool biased, has_winner_mask;

  std::string name() const override { return "ConvReluPoolBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&input, &weight, &winner_mask}) variable->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(3);
    check_saved("conv_relu_pool2d", has_winner_mask);
    // A bias that is not there is no input that autograd counts.
    const Mask mask = {task_should_compute_output(0), task_should_compute_output(1),
                       biased && task_should_compute_output(2)};
    return gradient_list(mask, conv_gradients(grads[0], input.unpack(), weight.unpack(),
                                              winner_mask.unpack(getptr()), options, mask, algorithms));
  }
};

Forward forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                const BlockOptions& options, bool save_winner_mask, const ChosenAlgorithms& algorithms) {
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return are_plain(input, weight, bias)
               ? convolve_block(input, weight, bias, options, save_winner_mask, algorithms)
               : call_forward(input, weight, bias, options, save_winner_mask, algorithms);
  };
  if (!records(input, weight, bias)) return below();
  const auto node = make_node<ConvReluPoolBackward>(input, weight, bias);
  node->options = options;
  node->algorithms = algorithms;
  node->biased = is_given(bias);
  node->has_winner_mask = save_winner_mask;
  node->input = saved(input);
  node->weight = saved(weight);
  Forward result = below();
  const auto& [output, winner_mask] = result;
  set_history(output, node);
  node->winner_mask = saved_winner_mask(options.pool, output, winner_mask);
  completed(node);
  return result;
}

Gradients backward_autograd(const Tensor& grad, const Tensor& input, const Tensor& weight,
                            const Tensor& winner_mask, const BlockOptions& options, Mask mask,
                            const ChosenAlgorithms& algorithms) {
  return filled(conv_gradients(grad, input, weight, winner_mask, options, mask, algorithms), input);
}

// ---- The public operator ------------------------------------------------------------------------------

Tensor conv_relu_pool2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const PublicOptions& options) {
  // Before dispatch, which would only say that there is no such kernel.
  check_layout("input", input);
  check_layout("weight", weight);
  const bool save_winner_mask = records(input, weight, bias);
  const bool batched = input.dim() != 3;
  const Tensor x = batched ? input : input.unsqueeze(0);
  const BlockChoice choice = choose_block(x, weight, options, save_winner_mask);
  if (choice.is_plain_convolution) return eager_block(input, weight, bias, options);
  const bool plain = are_plain(x, weight, bias);
  const auto ours = [&](const Tensor& i, const Tensor& w, const OptionalTensor& b) {
    return std::get<0>(plain ? forward(i, w, b, options, save_winner_mask, choice.algorithms)
                             : call_forward(i, w, b, options, save_winner_mask, choice.algorithms));
  };
#ifdef DLFAST_WITH_CUDA
  if (batched && eager_is_faster(input, weight, bias, options, save_winner_mask, ours)) {
    return eager_block(input, weight, bias, options);
  }
#endif
  const Tensor y = ours(x, weight, bias);
  return batched ? y : y.squeeze(0);
}

template <c10::DeviceType device>
Tensor conv_relu_pool2d_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 const PublicOptions& options) {
  static const Operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const PublicOptions&)> op(
      "dlfast::conv_relu_pool2d");
  const LowerPrecision cast(device);
  return op(cast(input), cast(weight), cast(bias), options);
}

}  // namespace

std::optional<Tensor> conv_relu_pool2d_plain(const Tensor& input, const Tensor& weight,
                                             const OptionalTensor& bias, const PublicOptions& options) {
  if (!are_plain(input, weight, bias)) return std::nullopt;
  RECORD_FUNCTION("dlfast::conv_relu_pool2d",
                  c10::ArrayRef<const c10::IValue>());  // as the dispatcher would for a profiler
  const c10::DeviceType device = input.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return conv_relu_pool2d(input, weight, bias, options);
  const LowerPrecision cast(device);
  return conv_relu_pool2d(cast(input), cast(weight), cast(bias), options);
}

TORCH_LIBRARY_IMPL(dlfast, CompositeImplicitAutograd, m) {
  m.impl("conv_relu_pool2d", kernel_of<"conv_relu_pool2d", conv_relu_pool2d>);
}

TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_conv_relu_pool2d", kernel_of<"conv_relu_pool2d", forward>);
  m.impl("_conv_relu_pool2d_backward", kernel_of<"conv_relu_pool2d_backward", backward_autograd>);
}

TORCH_LIBRARY_IMPL(dlfast, AutocastCPU, m) {
  m.impl("conv_relu_pool2d", kernel_of<"conv_relu_pool2d", conv_relu_pool2d_autocast<c10::kCPU>>);
}

TORCH_LIBRARY_IMPL(dlfast, AutocastCUDA, m) {
  m.impl("conv_relu_pool2d", kernel_of<"conv_relu_pool2d", conv_relu_pool2d_autocast<c10::kCUDA>>);
}

}  // namespace dlfast
