// Every algorithm of the CPU on tensors: allocates what it writes and its workspace, and calls the kernels.
#include "conv/op_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "conv/cpu/kernels.h"
#include "conv/cpu_grain.h"
#include "pool/op.h"

namespace dlfast {
namespace {

using at::Tensor;

// `groups` have so many output channels each.
WeightSteps steps_of(const Tensor& weight, int64_t group_out) {
  return {.out = weight.stride(0),
          .in = weight.stride(1),
          .kernel = {weight.stride(2), weight.stride(3)},
          .group = group_out * weight.stride(0)};
}

Tensor floats(const Tensor& like, int64_t count) {
  return at::empty({count}, like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
}

// p.winograd and p.grain for a forward kernel of ours.
void prepare_forward(ConvBlockParams& p, Algorithm algorithm, int64_t threads) {
  p.winograd = algorithm == Algorithm::winograd2 ? 2 : algorithm == Algorithm::winograd4 ? 4 : 0;
  const double strip =
      p.winograd == 0 ? 0.0 : static_cast<double>(p.conv.output_size[1] * p.conv.out_channels);
  p.grain = forward_grain(
      p, padded_length(p.conv, 1, p.conv.output_size[1]) * p.conv.group_in() * p.conv.stride[0] + strip,
      threads);
}

OptionalForward band_forward(ConvBlockParams p, Dtype dtype, Algorithm algorithm, const Tensor& input,
                             const Tensor& weight, const OptionalTensor& bias, bool save_winner_mask) {
  const ConvKernels& kernels = conv_cpu();
  const int64_t threads = at::get_num_threads();
  prepare_forward(p, algorithm, threads);
  const WeightSteps steps = steps_of(weight, p.conv.group_out());
  const Tensor b = is_given(bias) ? bias->contiguous() : Tensor();
  Tensor output = empty_output(p.pool, input, input.scalar_type());
  Tensor winner_mask = empty_winner_mask(p.pool, input, save_winner_mask);
  if (output.numel() > 0) {
    const Tensor workspace = floats(input, kernels.forward_workspace(p, dtype, threads));
    const bool done =
        kernels.forward(p, steps, dtype, input.const_data_ptr(), weight.const_data_ptr(),
                        b.defined() ? b.const_data_ptr() : nullptr, output.data_ptr(),
                        static_cast<uint8_t*>(winner_mask_pointer(winner_mask)), workspace.data_ptr<float>());
    if (!done) return std::nullopt;
  }
  return std::make_tuple(output, winner_mask);
}

OptionalForward depthwise_forward(const ConvBlockParams& p, Dtype dtype, const Tensor& input,
                                  const Tensor& weight, const OptionalTensor& bias, bool save_winner_mask) {
  const ConvKernels& kernels = conv_cpu();
  const int64_t threads = at::get_num_threads();
  const Tensor b = is_given(bias) ? bias->contiguous() : Tensor();
  const Tensor workspace = floats(input, kernels.depthwise_workspace(p, dtype, false, threads));
  Tensor output = empty_output(p.pool, input, input.scalar_type());
  kernels.depthwise_forward(p, steps_of(weight, 1), dtype, input.const_data_ptr(), weight.const_data_ptr(),
                            b.defined() ? b.const_data_ptr() : nullptr, output.data_ptr(),
                            workspace.data_ptr<float>(), threads);
  return std::make_tuple(output, empty_winner_mask(p.pool, input, save_winner_mask));
}

SparseGradient sparse_gradient(const ReluPoolParams& p, Dtype dtype, const Tensor& grad_output,
                               const Tensor& winner_mask) {
  constexpr auto kLast = at::MemoryFormat::ChannelsLast;
  const ConvKernels& kernels = conv_cpu();
  const int64_t pixels = p.output_size[0] * p.output_size[1];
  const bool masked = p.pool == Pool::none && p.activation == Activation::relu;
  SparseGradient result;
  const bool from_last = grad_output.is_contiguous(kLast);
  const Tensor from = from_last ? grad_output : grad_output.contiguous();
  result.grad = from;
  if (masked || !from_last) {
    result.grad = at::empty(from.sizes(), from.options().memory_format(kLast));
    kernels.to_channels_last(p.batch, p.channels, pixels, dtype, from_last, from.const_data_ptr(),
                             p.channels_last, masked ? winner_mask.const_data_ptr() : nullptr,
                             result.grad.data_ptr());
  }
  if (p.pool == Pool::max && p.channels_last) result.winner_mask = winner_mask;
  if (p.pool == Pool::max && !p.channels_last) {
    result.winner_mask = at::empty(winner_mask.sizes(), winner_mask.options().memory_format(kLast));
    kernels.winner_mask_to_channels_last(p.batch, p.channels, pixels, winner_mask.const_data_ptr<uint8_t>(),
                                         result.winner_mask.data_ptr<uint8_t>());
  }
  return result;
}

// grad_weight and grad_bias by our kernels; false where they are to be had from PyTorch's kernels only.
bool own_grad_weight(ConvBlockParams p, Dtype dtype, Algorithm algorithm, const SparseGradient& gradient,
                     const Tensor& input, Tensor& grad_weight, Tensor& grad_bias) {
  const ConvKernels& kernels = conv_cpu();
  const int64_t threads = at::get_num_threads();
  const GradWeightKernel kernel = algorithm == Algorithm::masked ? GradWeightKernel::masked
                                  : algorithm == Algorithm::rows ? GradWeightKernel::rows
                                                                 : GradWeightKernel::channels;
  // Positions that no window covers get no gradient, and PyTorch's products of 0 and infinity or NaN are made
  // by PyTorch's kernels only. The sum of what is not finite is not.
  if (!windows_cover(p.pool) && !std::isfinite(at::sum(input, at::kFloat).item<float>())) return false;
  p.grain = grad_weight_grain(p, kernel, threads);
  const Tensor workspace = floats(input, kernels.grad_weight_workspace(p, kernel, threads));
  return kernels.grad_weight(p, kernel, dtype, input.const_data_ptr(), gradient.grad.const_data_ptr(),
                             gradient.who(), grad_weight.data_ptr(), grad_bias.data_ptr(),
                             workspace.data_ptr<float>());
}

// grad_weight where nothing was pooled, by Winograd's method: our transforms around PyTorch's matrix
// products.
bool winograd_grad_weight(ConvBlockParams p, Dtype dtype, const SparseGradient& gradient, const Tensor& input,
                          Tensor& grad_weight) {
  constexpr int64_t kElements = 36;  // of a transformed tile
  const ConvKernels& kernels = conv_cpu();
  const int64_t threads = at::get_num_threads(), in = p.conv.group_in(), out = p.conv.group_out();
  prepare_forward(p, Algorithm::winograd4, threads);
  const int64_t bands = kernels.weight_bands(p);
  // As many bands at once as half of the bound on workspace leaves room for.
  const auto room = static_cast<int64_t>(kMostWorkspaceFloats) / 2 * threads;
  const int64_t per_band = std::max<int64_t>(1, kElements * kernels.weight_tiles(p, 0, 1) * (in + out));
  const int64_t at_once = std::clamp<int64_t>(room / per_band, 1, bands);
  const auto options = input.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const Tensor workspace = floats(input, kernels.weight_sources_workspace(p, threads));
  for (int64_t group = 0; group < p.conv.groups; ++group) {
    Tensor sums;  // [36, C, K]
    for (int64_t first = 0; first < bands; first += at_once) {
      const int64_t last = std::min(first + at_once, bands), tiles = kernels.weight_tiles(p, first, last);
      const Tensor inputs = at::empty({kElements, tiles, in}, options);
      const Tensor gradients = at::empty({kElements, tiles, out}, options);
      kernels.weight_sources(p, dtype, group, first, last, input.const_data_ptr(),
                             gradient.grad.const_data_ptr(), inputs.data_ptr<float>(),
                             gradients.data_ptr<float>(), workspace.data_ptr<float>());
      if (sums.defined()) {
        sums.baddbmm_(inputs.transpose(1, 2), gradients);
      } else {
        sums = at::bmm(inputs.transpose(1, 2), gradients);
      }
    }
    Tensor part = grad_weight.narrow(0, group * out, out);
    if (!kernels.weight_from_sums(p, dtype, sums.const_data_ptr<float>(), part.data_ptr())) return false;
  }
  return true;
}

bool own_grad_input(ConvBlockParams p, Dtype dtype, const SparseGradient& gradient, const Tensor& weight,
                    Tensor& grad_input) {
  const ConvKernels& kernels = conv_cpu();
  const int64_t threads = at::get_num_threads();
  p.grain = grad_input_grain(p, threads);
  const Tensor w = weight.contiguous();
  const Tensor workspace = floats(weight, kernels.grad_input_workspace(p, threads));
  return kernels.grad_input(p, dtype, w.const_data_ptr(), gradient.grad.const_data_ptr(), gradient.who(),
                            grad_input.data_ptr(), workspace.data_ptr<float>());
}

// grad_input where nothing was pooled: the convolution of the gradient with the kernel turned around.
bool winograd_grad_input(const ConvBlockParams& p, Dtype dtype, const SparseGradient& gradient,
                         const Tensor& weight, Tensor& grad_input) {
  const ConvKernels& kernels = conv_cpu();
  const int64_t threads = at::get_num_threads();
  const Tensor& grad_z = gradient.grad;
  ConvBlockParams q = p;
  // Turned around: from the last tap to the first, with the channels exchanged.
  const WeightSteps steps{.out = weight.stride(1),
                          .in = weight.stride(0),
                          .kernel = {-weight.stride(2), -weight.stride(3)},
                          .group = p.conv.group_out() * weight.stride(0)};
  const int64_t last_tap = 2 * (weight.stride(2) + weight.stride(3));
  const void* turned =
      static_cast<const char*>(weight.const_data_ptr()) + last_tap * static_cast<int64_t>(weight.itemsize());
  std::swap(q.conv.in_channels, q.conv.out_channels);
  q.pool.channels = q.conv.out_channels;
  q.pool.activation = Activation::none;
  for (const int axis : {0, 1}) {
    q.conv.input_size[axis] = p.conv.output_size[axis];
    q.conv.output_size[axis] = q.pool.input_size[axis] = q.pool.output_size[axis] = p.conv.input_size[axis];
    q.conv.padding[axis] = 2 - p.conv.padding[axis];
  }
  for (const int axis : {0, 1, 2, 3}) q.input_strides[axis] = grad_z.stride(axis);
  prepare_forward(q, Algorithm::winograd4, threads);
  const Tensor workspace = floats(weight, kernels.forward_workspace(q, dtype, threads));
  return kernels.forward(q, steps, dtype, grad_z.const_data_ptr(), turned, nullptr, grad_input.data_ptr(),
                         nullptr, workspace.data_ptr<float>());
}

void depthwise_grad_input(const ConvBlockParams& p, Dtype dtype, const Tensor& grad_z, const Tensor& weight,
                          Tensor& grad_input) {
  const ConvKernels& kernels = conv_cpu();
  const int64_t threads = at::get_num_threads();
  const Tensor workspace = floats(grad_z, kernels.depthwise_workspace(p, dtype, true, threads));
  kernels.depthwise_grad_input(p, steps_of(weight, 1), dtype, weight.const_data_ptr(),
                               grad_z.const_data_ptr(), grad_input.data_ptr(), workspace.data_ptr<float>(),
                               threads);
}

void depthwise_grad_weight(const ConvBlockParams& p, Dtype dtype, const Tensor& grad_z, const Tensor& input,
                           Tensor& grad_weight, Tensor* grad_bias) {
  const ConvKernels& kernels = conv_cpu();
  const Tensor workspace = floats(input, kernels.depthwise_grad_weight_workspace(p, dtype));
  kernels.depthwise_grad_weight(
      p, dtype, input.const_data_ptr(), grad_z.const_data_ptr(), grad_weight.data_ptr(),
      grad_bias == nullptr ? nullptr : grad_bias->data_ptr(), workspace.data_ptr<float>());
}

}  // namespace

OptionalForward cpu_forward(const ConvBlockParams& p, Dtype dtype, Algorithm algorithm, const Tensor& input,
                            const Tensor& weight, const OptionalTensor& bias, bool save_winner_mask) {
  if (algorithm == Algorithm::depthwise) {
    return depthwise_forward(p, dtype, input, weight, bias, save_winner_mask);
  }
  return band_forward(p, dtype, algorithm, input, weight, bias, save_winner_mask);
}

CpuGradient::CpuGradient(const ConvBlockParams& p, Dtype dtype, const Tensor& grad_output,
                         const Tensor& winner_mask)
    : p_(p), dtype_(dtype), gradient_(sparse_gradient(p.pool, dtype, grad_output, winner_mask)) {}

std::optional<std::tuple<Tensor, Tensor>> CpuGradient::weight(Algorithm algorithm, const Tensor& input,
                                                              const Tensor& weight, bool needs_bias) const {
  Tensor grad_weight = at::empty(weight.sizes(), weight.options()).contiguous();
  Tensor grad_bias = at::empty({p_.conv.out_channels}, weight.options());
  bool done = true;
  if (algorithm == Algorithm::depthwise) {
    depthwise_grad_weight(p_, dtype_, gradient_.grad, input, grad_weight, needs_bias ? &grad_bias : nullptr);
  } else if (algorithm == Algorithm::winograd4) {
    done = winograd_grad_weight(p_, dtype_, gradient_, input, grad_weight);
    if (done && needs_bias) grad_bias = gradient_.grad.sum({0, 2, 3});
  } else {
    done = own_grad_weight(p_, dtype_, algorithm, gradient_, input, grad_weight, grad_bias);
  }
  if (!done) return std::nullopt;
  return std::make_tuple(grad_weight, grad_bias);
}

std::optional<Tensor> CpuGradient::input(Algorithm algorithm, const Tensor& input,
                                         const Tensor& weight) const {
  Tensor grad_input = at::empty(input.sizes(), input.options().memory_format(format_of(p_.pool)));
  bool done = true;
  if (algorithm == Algorithm::depthwise) {
    depthwise_grad_input(p_, dtype_, gradient_.grad, weight, grad_input);
  } else if (algorithm == Algorithm::winograd4) {
    done = winograd_grad_input(p_, dtype_, gradient_, weight, grad_input);
  } else {
    done = own_grad_input(p_, dtype_, gradient_, weight, grad_input);
  }
  if (!done) return std::nullopt;
  return grad_input;
}

}  // namespace dlfast
