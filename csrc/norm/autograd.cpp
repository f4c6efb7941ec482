// Derivatives of batch normalisation with activation and pooling.
#include "norm/autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/node.h"
#include "core/operator.h"
#include "core/plain.h"
#include "pool/autograd.h"

namespace dlfast {
namespace {

using at::Tensor;
using c10::SymInt;

Normalised call_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& mean, const OptionalTensor& var, double eps,
                        const PoolOptions& options, bool save_winner_mask) {
  static const Operator<Normalised(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&, double, const PoolOptions&,
                                   bool)>
      op("dlfast::_batch_norm_relu_pool2d");
  return op(input, weight, bias, mean, var, eps, options, save_winner_mask);
}

Gradients call_backward(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                        const Tensor& statistics, const Tensor& winner_mask, bool batch_statistics,
                        double eps, const PoolOptions& options, Mask mask) {
  static const Operator<Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                  const Tensor&, bool, double, const PoolOptions&, Mask)>
      op("dlfast::_batch_norm_relu_pool2d_backward");
  return op(grad, input, weight, statistics, winner_mask, batch_statistics, eps, options, mask);
}

// A row of the statistics, to be joined with [N, C, H, W].
Tensor row_of(const Tensor& statistics, StatisticsRow row) {
  return statistics.select(0, row).view_symint({1, statistics.sym_size(1), 1, 1});
}

// The gradient before the activation, from pieces that PyTorch or we can differentiate again.
Tensor gradient_before_activation(const Tensor& grad, const Tensor& input, const Tensor& statistics,
                                  const Tensor& winner_mask, const PoolOptions& options) {
  const std::vector<SymInt> size = {input.sym_size(2), input.sym_size(3)};
  if (options.pool == Pool::max) return call_expand(grad, winner_mask.detach(), size, options);
  PoolOptions average = options;
  average.activation = Activation::none;
  const Tensor dense =
      options.pool == Pool::avg ? call_expand(grad, winner_mask.detach(), size, average) : grad;
  if (options.activation == Activation::none) return dense;
  const Tensor z = input.detach().to(statistics.scalar_type());
  const Tensor dead = z.mul(row_of(statistics, kScale)).add_(row_of(statistics, kShift)).le(0);
  return dense.masked_fill(dead, 0);
}

}  // namespace

Gradients norm_gradients(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                         const Tensor& statistics, const Tensor& winner_mask, bool batch_statistics,
                         double eps, const PoolOptions& options, Mask mask) {
  if (!records(grad, input, weight)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return are_plain(input, grad, weight, statistics, winner_mask)
               ? normalise_backward(grad, input, weight, statistics, winner_mask, batch_statistics, options,
                                    mask)
               : call_backward(grad, input, weight, statistics, winner_mask, batch_statistics, eps, options,
                               mask);
  }
  const Tensor dense = gradient_before_activation(grad, input, statistics, winner_mask, options);
  const Tensor mean = statistics.select(0, kMean);
  return at::native_batch_norm_backward(dense, input, weight, mean, statistics.select(0, kVariance), mean,
                                        statistics.select(0, kInverse), batch_statistics, eps, mask);
}

bool takes_normalisation(at::ScalarType dtype, int64_t channels, c10::Device device,
                         std::initializer_list<std::reference_wrapper<const OptionalTensor>> vectors) {
  switch (dtype) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      break;
    default:
      return false;
  }
  const at::ScalarType wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  return std::all_of(vectors.begin(), vectors.end(), [&](const OptionalTensor& vector) {
    return !is_given(vector) ||
           (vector->dim() == 1 && vector->size(0) == channels && vector->device() == device &&
            (vector->scalar_type() == dtype || vector->scalar_type() == wide));
  });
}

void check_batch(const Tensor& input) {
  TORCH_CHECK_VALUE(input.numel() > input.size(1),
                    "Expected more than 1 value per channel when training, got input size ", input.sizes());
}

namespace {

struct BatchNormReluPoolBackward : torch::autograd::Node {
  SavedVariable input, weight, statistics, winner_mask;
  PoolOptions options;
  double eps;
  bool batch_statistics, has_winner_mask;

  std::string name() const override { return "BatchNormReluPoolBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&input, &weight, &statistics, &winner_mask}) variable->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(3);
    check_saved("batch_norm_relu_pool2d", has_winner_mask);
    const Mask mask = {task_should_compute_output(0), task_should_compute_output(1),
                       task_should_compute_output(2)};
    return gradient_list(mask, norm_gradients(grads[0], input.unpack(), unpacked(weight), statistics.unpack(),
                                              winner_mask.unpack(), batch_statistics, eps, options, mask));
  }
};

// What `run` gives, with its derivatives recorded where somebody asks for them.
template <typename Run>
Normalised recorded(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                    bool batch_statistics, double eps, const PoolOptions& options, bool save_winner_mask,
                    const Run& run) {
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return run();
  };
  if (!records(input, weight, bias)) return below();
  const auto node = make_node<BatchNormReluPoolBackward>(input, weight, bias);
  node->options = options;
  node->eps = eps;
  node->batch_statistics = batch_statistics;
  node->has_winner_mask = save_winner_mask;
  node->input = saved(input);
  node->weight = saved(weight);
  Normalised result = below();
  node->winner_mask = saved(std::get<1>(result));
  node->statistics = saved(std::get<2>(result));
  set_history(std::get<0>(result), node);
  completed(node);
  return result;
}

Normalised forward_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& mean, const OptionalTensor& var, double eps,
                            const PoolOptions& options, bool save_winner_mask) {
  return recorded(input, weight, bias, !is_given(mean), eps, options, save_winner_mask, [&] {
    return call_forward(input, weight, bias, mean, var, eps, options, save_winner_mask);
  });
}

Gradients backward_autograd(const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
                            const Tensor& statistics, const Tensor& winner_mask, bool batch_statistics,
                            double eps, const PoolOptions& options, Mask mask) {
  return filled(
      norm_gradients(grad, input, weight, statistics, winner_mask, batch_statistics, eps, options, mask),
      input);
}

}  // namespace

std::optional<Tensor> batch_norm_relu_pool2d(const Tensor& input, const OptionalTensor& running_mean,
                                             const OptionalTensor& running_var, const OptionalTensor& weight,
                                             const OptionalTensor& bias, bool training, double momentum,
                                             double eps, const PoolOptions& options) {
  const bool given = is_given(running_mean) && is_given(running_var);
  if (input.dim() != 4 || input.numel() == 0 || (!training && !given) ||
      !are_plain(input, running_mean, running_var, weight, bias) || asks_gradient(running_mean) ||
      asks_gradient(running_var) ||
      !takes_normalisation(input.scalar_type(), input.size(1), input.device(),
                           {running_mean, running_var, weight, bias})) {
    return std::nullopt;
  }
  RECORD_FUNCTION("dlfast::batch_norm_relu_pool2d", c10::ArrayRef<const c10::IValue>());  // for a profiler
  if (training) check_batch(input);
  const bool save_winner_mask = records(input, weight, bias);
  const OptionalTensor none;
  return std::get<0>(recorded(input, weight, bias, training, eps, options, save_winner_mask, [&] {
    return normalise(input, weight, bias, training ? none : running_mean, training ? none : running_var, eps,
                     options, save_winner_mask,
                     training ? RunningStatistics{running_mean, running_var, momentum} : RunningStatistics{});
  }));
}

TORCH_LIBRARY_IMPL(dlfast, Autograd, m) {
  m.impl("_batch_norm_relu_pool2d", kernel_of<"batch_norm_relu_pool2d", forward_autograd>);
  m.impl("_batch_norm_relu_pool2d_backward", kernel_of<"batch_norm_relu_pool2d_backward", backward_autograd>);
}

}  // namespace dlfast
