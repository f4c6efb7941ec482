#include "chain/conv_norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/record_function.h>

#include <string>
#include <tuple>

#include "conv/autograd.h"
#include "conv/heuristics.h"
#include "conv/op.h"
#include "core/autocast.h"
#include "core/node.h"
#include "core/plain.h"
#include "norm/autograd.h"

namespace dlfast {
namespace {

using at::Tensor;

// The convolution by itself.
BlockOptions convolution_of(const ConvNormOptions& options) {
  constexpr PoolWindow one{.size = {1, 1}, .stride = {1, 1}, .padding = {0, 0}};
  return {options.conv,
          {.activation = Activation::none, .pool = Pool::none, .window = one, .ceil_mode = false}};
}

struct ConvNormPoolBackward : torch::autograd::Node {
  SavedVariable input, weight, bias, z, norm_weight, statistics, winner_mask;
  ConvNormOptions options;
  ChosenAlgorithms algorithms;
  double eps;
  bool biased;

  std::string name() const override { return "ConvBatchNormReluPoolBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&input, &weight, &bias, &z, &norm_weight, &statistics, &winner_mask}) {
      variable->reset_data();
    }
  }

  // What the normalisation had for its input: for second derivatives with the graph that leads to it.
  Tensor normalised_input(const Tensor& x, const Tensor& w) const {
    const OptionalTensor b = unpacked(bias);
    if (!records(x, w, b)) return z.unpack();
    const ConvOptions& c = options.conv;
    return at::conv2d(x, w, b, c.stride, c.padding, c.dilation, c.groups);
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(5);  // of input, weight, bias, norm_weight, norm_bias
    if (!grads[0].defined()) return result;
    const auto asked = [&](size_t index) { return task_should_compute_output(index); };
    // A bias that is not there is no input that autograd counts.
    const Mask of_conv = {asked(0), asked(1), biased && asked(2)};
    const bool needs_z = of_conv[0] || of_conv[1] || of_conv[2];
    const Tensor x = input.unpack(), w = weight.unpack();
    auto [grad_z, grad_norm_weight, grad_norm_bias] = norm_gradients(
        grads[0], normalised_input(x, w), unpacked(norm_weight), statistics.unpack(), winner_mask.unpack(),
        /*batch_statistics=*/true, eps, options.pool, {needs_z, asked(3), asked(4)});
    if (needs_z) {
      const Gradients of = conv_gradients(grad_z, x, w, grad_z, convolution_of(options), of_conv, algorithms);
      std::tie(result[0], result[1], result[2]) = of;
    }
    for (const int i : {0, 1, 2}) result[i] = defined_if(of_conv[i], result[i]);
    result[3] = defined_if(asked(3), grad_norm_weight);
    result[4] = defined_if(asked(4), grad_norm_bias);
    return result;
  }
};

std::optional<Tensor> run(const ConvNormTensors& t, double momentum, double eps,
                          const ConvNormOptions& options) {
  if (t.input.numel() == 0 ||
      !takes_normalisation(t.input.scalar_type(), t.weight.size(0), t.input.device(),
                           {t.running_mean, t.running_var, t.norm_weight, t.norm_bias})) {
    return std::nullopt;
  }
  const BlockOptions convolution = convolution_of(options);
  const bool of_conv = records(t.input, t.weight, t.bias);
  const bool recording = of_conv || records(t.norm_weight, t.norm_bias);
  const ChosenAlgorithms algorithms = choose_block(t.input, t.weight, convolution, of_conv).algorithms;
  Tensor z, output, winner_mask, statistics;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    z = std::get<0>(convolve_block(t.input, t.weight, t.bias, convolution, of_conv, algorithms));
    check_batch(z);
    std::tie(output, winner_mask, statistics) =
        normalise(z, t.norm_weight, t.norm_bias, std::nullopt, std::nullopt, eps, options.pool, recording,
                  {t.running_mean, t.running_var, momentum});
  }
  if (!recording) return output;
  const auto node = make_node<ConvNormPoolBackward>(t.input, t.weight, t.bias, t.norm_weight, t.norm_bias);
  node->options = options;
  node->algorithms = algorithms;
  node->eps = eps;
  node->biased = is_given(t.bias);
  node->input = saved(t.input);
  node->weight = saved(t.weight);
  node->bias = saved(t.bias);
  node->z = saved(z);
  node->norm_weight = saved(t.norm_weight);
  node->statistics = saved(statistics);
  node->winner_mask = saved(winner_mask);
  set_history(output, node);
  completed(node);
  return output;
}

}  // namespace

std::optional<Tensor> conv_norm_pool2d(const ConvNormTensors& t, double momentum, double eps,
                                       const ConvNormOptions& options) {
  if (t.input.dim() != 4 || t.weight.dim() != 4 ||
      !are_plain(t.input, t.weight, t.bias, t.running_mean, t.running_var, t.norm_weight, t.norm_bias) ||
      asks_gradient(t.running_mean) || asks_gradient(t.running_var)) {
    return std::nullopt;
  }
  RECORD_FUNCTION("dlfast::conv_batch_norm_relu_pool2d",
                  c10::ArrayRef<const c10::IValue>());  // for a profiler
  if (const c10::DeviceType device = t.input.device().type(); at::autocast::is_autocast_enabled(device)) {
    const LowerPrecision cast(device);
    const Tensor input = cast(t.input), weight = cast(t.weight);
    const OptionalTensor bias = cast(t.bias);
    return run({input, weight, bias, t.running_mean, t.running_var, t.norm_weight, t.norm_bias}, momentum,
               eps, options);
  }
  return run(t, momentum, eps, options);
}

}  // namespace dlfast
