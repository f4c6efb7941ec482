// The whole block on tensors, for CPU and CUDA alike: check, allocate, call the algorithm that was chosen.
#include "conv/op.h"

#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "conv/heuristics.h"
#include "conv/op_cpu.h"
#include "conv/op_cuda.h"
#include "core/ran.h"
#include "pool/op.h"

namespace dlfast {
namespace {

using at::IntArrayRef;
using at::Tensor;

void count(const Tensor& tensor, Part part, Algorithm algorithm) {
  static RanTable table("conv_relu_pool2d", {std::begin(kPartNames), std::end(kPartNames)},
                        {std::begin(kAlgorithmNames), std::end(kAlgorithmNames)});
  table.add(tensor.is_cuda(), static_cast<int>(part), static_cast<int>(algorithm));
}

// What an operator works on, checked.
struct Problem {
  const Tensor& input;
  const Tensor& weight;
  const BlockOptions& options;
  Dtype dtype;
  ConvBlockParams p;

  Problem(const char* op, const Tensor& input_, const Tensor& weight_, const BlockOptions& options_)
      : input(input_), weight(weight_), options(options_), dtype(check_dtype(op, "input", input_)) {
    check_alike(op, "input", input, "input", input);
    check_alike(op, "weight", weight, "input", input);
    p = params_of(op, options, input, weight);
  }

  // Some of PyTorch's convolutions answer in another format than the one that backward will expect.
  Tensor convolve(const OptionalTensor& bias) const {
    const ConvOptions& c = options.conv;
    return at::conv2d(input, weight, bias, c.stride, c.padding, c.dilation, c.groups)
        .contiguous(format_of(p.pool));
  }
};

// ---- Forward ------------------------------------------------------------------------------------------

using Forward = std::tuple<Tensor, Tensor>;  // output, winner_mask

Forward pytorch_on_cpu(const Problem& q, const OptionalTensor& bias, bool save_winner_mask) {
  const Tensor z = q.convolve(bias);
  if (q.p.pool.pool != Pool::none || z.numel() == 0) {
    return relu_pool2d_in(q.p.pool.channels_last, z, std::nullopt, q.options.pool, save_winner_mask);
  }
  // Nobody else sees z, so that ReLU needs no second tensor.
  if (q.p.pool.activation == Activation::relu) {
    pool_kernels(z).forward(q.p.pool, q.dtype, z.const_data_ptr(), nullptr, z.data_ptr(), nullptr, nullptr);
  }
  return {z, empty_winner_mask(q.p.pool, z, save_winner_mask)};
}

#ifdef DLFAST_WITH_CUDA
Forward single_on_cuda(const Problem& q, const CudaConv& c, const OptionalTensor& bias,
                       bool save_winner_mask) {
  Tensor output = empty_output(q.p.pool, q.input, q.input.scalar_type());
  Tensor winner_mask = empty_winner_mask(q.p.pool, q.input, save_winner_mask);
  single_forward(c, q.input, q.weight, bias, output, winner_mask);
  return {output, winner_mask};
}
#endif

}  // namespace

Forward convolve_block(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       const BlockOptions& options, bool save_winner_mask,
                       const ChosenAlgorithms& algorithms) {
  constexpr const char* op = "conv_relu_pool2d";
  const Problem q(op, input, weight, options);
  check_bias(op, bias, q.p.conv.out_channels, input);

  const c10::OptionalDeviceGuard guard(input.device());
  const Context context = context_of(input, q.dtype, save_winner_mask);
  const auto done = [&](Algorithm algorithm, const Forward& result) {
    if (std::get<0>(result).numel() > 0) count(input, Part::forward, algorithm);
    return result;
  };
  // cuDNN's convolution takes a pass of its own for the bias, which ours saves.
  const auto pytorch = [&] {
    if (options.pool.is_nothing())
      return Forward{q.convolve(bias), empty_winner_mask(q.p.pool, input, false)};
    return input.is_cpu() ? pytorch_on_cpu(q, bias, save_winner_mask)
                          : relu_pool2d_in(q.p.pool.channels_last, q.convolve(std::nullopt), bias,
                                           options.pool, save_winner_mask);
  };
#ifdef DLFAST_WITH_CUDA
  if (context.device != nullptr) {
    const CudaConv c{q.p, q.dtype, context.math_mode};
    measure_forward(
        c, save_winner_mask, input, [&] { pytorch(); },
        [&] { single_on_cuda(q, c, bias, save_winner_mask); });
    if (choose(q.p, context, Part::forward).algorithm() == Algorithm::single) {
      return done(Algorithm::single, single_on_cuda(q, c, bias, save_winner_mask));
    }
    return done(Algorithm::pytorch, pytorch());
  }
#endif
  const Algorithm algorithm = chosen_or_choose(algorithms, q.p, context, Part::forward);
  if (algorithm != Algorithm::pytorch) {
    const auto result = cpu_forward(q.p, q.dtype, algorithm, input, weight, bias, save_winner_mask);
    if (result) return done(algorithm, *result);
  }
  return done(Algorithm::pytorch, pytorch());
}

// ---- Backward -----------------------------------------------------------------------------------------

namespace {

// A backward, its tensors checked.
struct Backward : Problem {
  const Tensor& grad_output;
  const Tensor& winner_mask;

  Tensor expand() const { return expand_gradient(p.pool, dtype, grad_output, winner_mask); }
  // PyTorch's gradients of the convolution.
  Gradients dense(const Tensor& grad_z, Mask mask) const {
    const ConvParams& c = p.conv;
    return at::convolution_backward(grad_z, input, weight, IntArrayRef(&c.out_channels, 1), c.stride,
                                    c.padding, c.dilation, /*transposed=*/false, /*output_padding=*/{0, 0},
                                    c.groups, mask);
  }
  // On CUDA grad_bias needs no second pass over the dense gradient, but that an average sends everywhere.
  bool bias_from_pooled() const { return input.is_cuda() && p.pool.pool != Pool::avg; }
  Tensor bias([[maybe_unused]] const Tensor& grad_z) const {
#ifdef DLFAST_WITH_CUDA
    return cuda_grad_bias(p.pool, dtype, bias_from_pooled() ? grad_output : grad_z, winner_mask);
#else
    return {};
#endif
  }
  // Those that `mask` asks for still, by PyTorch's kernels.
  Gradients complete(Gradients found, Mask mask) const {
    if (!mask[0] && !mask[1] && !mask[2]) return found;
    Tensor grad_z;
    if (mask[0] || mask[1] || !bias_from_pooled()) grad_z = expand();
    if (mask[2] && input.is_cuda()) {
      std::get<2>(found) = bias(grad_z);
      mask[2] = false;
      if (!mask[0] && !mask[1]) return found;
    }
    const auto [dense_input, dense_weight, dense_bias] = dense(grad_z, mask);
    if (mask[0]) {
      std::get<0>(found) = dense_input;
      count(input, Part::grad_input, Algorithm::pytorch);
    }
    if (mask[1]) {
      std::get<1>(found) = dense_weight;
      count(input, Part::grad_weight, Algorithm::pytorch);
    }
    if (mask[2]) std::get<2>(found) = dense_bias;
    return found;
  }
};

Gradients cpu_backward(const Backward& b, const Context& context, const ChosenAlgorithms& algorithms,
                       Mask mask) {
  const auto algorithm_of = [&](bool wanted, Part part) {
    return wanted ? chosen_or_choose(algorithms, b.p, context, part) : Algorithm::pytorch;
  };
  const Algorithm weight_algorithm = algorithm_of(mask[1], Part::grad_weight);
  const Algorithm input_algorithm = algorithm_of(mask[0], Part::grad_input);
  Tensor grad_input, grad_weight, grad_bias;
  std::optional<CpuGradient> own;
  if (weight_algorithm != Algorithm::pytorch || input_algorithm != Algorithm::pytorch) {
    own.emplace(b.p, b.dtype, b.grad_output, b.winner_mask);
  }
  if (weight_algorithm != Algorithm::pytorch) {
    if (const auto found = own->weight(weight_algorithm, b.input, b.weight, mask[2])) {
      grad_weight = std::get<0>(*found);
      if (mask[2]) grad_bias = std::get<1>(*found);
      mask[1] = mask[2] = false;
      count(b.input, Part::grad_weight, weight_algorithm);
    }
  }
  if (input_algorithm != Algorithm::pytorch) {
    if (const auto found = own->input(input_algorithm, b.input, b.weight)) {
      grad_input = *found;
      mask[0] = false;
      count(b.input, Part::grad_input, input_algorithm);
    }
  }
  return b.complete({grad_input, grad_weight, grad_bias}, mask);
}

#ifdef DLFAST_WITH_CUDA
Gradients cuda_backward(const Backward& b, const Context& context, Mask mask) {
  const CudaConv c{b.p, b.dtype, context.math_mode};
  const auto own_weight = [&] {
    return single_grad_weight(c, b.input, b.weight, b.grad_output, b.winner_mask);
  };
  const auto own_input = [&] {
    return single_grad_input(c, b.input, b.weight, b.grad_output, b.winner_mask);
  };
  {
    Tensor expanded;
    const auto grad_z = [&]() -> const Tensor& {
      if (!expanded.defined()) expanded = b.expand();  // there was no memory for it when it was measured
      return expanded;
    };
    measure_backward(c, b.input, mask,
                     {.expand = [&] { expanded = b.expand(); },
                      .dense_input = [&] { b.dense(grad_z(), {true, false, false}); },
                      .dense_weight =
                          [&] {
                            b.dense(grad_z(), {false, true, false});
                            if (mask[2]) b.bias(grad_z());
                          },
                      .own_input = [&] { own_input(); },
                      .own_weight = [&] { own_weight(); }});
  }
  Tensor grad_input, grad_weight, grad_bias;
  if (mask[1] && choose(b.p, context, Part::grad_weight).algorithm() == Algorithm::single) {
    const auto [own, own_bias] = own_weight();
    grad_weight = own;
    if (mask[2]) grad_bias = own_bias;
    mask[1] = mask[2] = false;
    count(b.input, Part::grad_weight, Algorithm::single);
  }
  if (mask[0] && choose(b.p, context, Part::grad_input).algorithm() == Algorithm::single) {
    grad_input = own_input();
    mask[0] = false;
    count(b.input, Part::grad_input, Algorithm::single);
  }
  return b.complete({grad_input, grad_weight, grad_bias}, mask);
}
#endif

}  // namespace

Gradients convolve_block_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                  const Tensor& winner_mask, const BlockOptions& options, Mask output_mask,
                                  const ChosenAlgorithms& algorithms) {
  constexpr const char* op = "conv_relu_pool2d_backward";
  const Problem q(op, input, weight, options);
  check_alike(op, "grad_output", grad_output, "input", input);
  check_sizes(op, "grad_output", grad_output,
              {q.p.conv.batch, q.p.conv.out_channels, q.p.pool.output_size[0], q.p.pool.output_size[1]});
  const c10::OptionalDeviceGuard guard(input.device());
  const Tensor checked = check_winner_mask(op, q.p.pool, winner_mask, grad_output);

  const Backward b{q, grad_output, checked};
  const Context context = context_of(input, q.dtype, true, output_mask);
#ifdef DLFAST_WITH_CUDA
  if (context.device != nullptr) return cuda_backward(b, context, output_mask);
#endif
  return cpu_backward(b, context, algorithms, output_mask);
}

namespace {

Gradients backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                   const Tensor& winner_mask, const BlockOptions& options, Mask mask,
                   const ChosenAlgorithms& algorithms) {
  return filled(convolve_block_backward(grad_output, input, weight, winner_mask, options, mask, algorithms),
                input);
}

void register_all(torch::Library& m) {
  m.impl("_conv_relu_pool2d", kernel_of<"conv_relu_pool2d", convolve_block>);
  m.impl("_conv_relu_pool2d_backward", kernel_of<"conv_relu_pool2d_backward", backward>);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, CPU, m) {
  register_all(m);
}

#ifdef DLFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(dlfast, CUDA, m) {
  register_all(m);
}
#endif

}  // namespace dlfast
