// The whole block on tensors, for CPU and CUDA alike: check, allocate, plan, call the backend's kernels.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <tuple>

#include "checks.h"
#include "conv_relu_pool/op.h"
#include "conv_relu_pool/op_cuda.h"
#include "conv_relu_pool/op_depthwise.h"
#include "conv_relu_pool/op_relu_pool.h"
#include "conv_relu_pool/plan.h"

namespace dlfast {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalName = std::optional<std::string_view>;

// The memory format PyTorch's convolution gives its output.
at::MemoryFormat convolution_format(const Tensor& input, const Tensor& weight) {
  const auto is_last = [](const Tensor& t) {
    return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  };
  return is_last(input) || is_last(weight) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

ConvBlockParams check_block(const char* op, const Tensor& input, const Tensor& weight, const BlockArgs& block,
                            const PoolArgs& pooling) {
  ConvBlockParams p{};
  p.conv = check_convolution(op, input, weight, block);
  const std::array<int64_t, 4> sizes = {p.conv.batch, p.conv.out_channels, p.conv.output_size[0],
                                        p.conv.output_size[1]};
  const bool last = convolution_format(input, weight) == at::MemoryFormat::ChannelsLast;
  p.pool = check_pooling(op, sizes, pooling, last);
  for (const int axis : {0, 1, 2, 3}) p.input_strides[axis] = input.stride(axis);
  return p;
}

PlanContext context_of(const Tensor& input, Dtype dtype, bool save_code) {
  PlanContext context{.dtype = dtype,
                      .cpu = input.is_cpu() && input.numel() > 0,
                      .save_code = save_code,
                      .threads = at::get_num_threads(),
                      .device = nullptr,
                      .products = Products::fma};
#ifdef DLFAST_WITH_CUDA
  if (input.is_cuda() && input.numel() > 0) {
    context.device = &current_cuda_device();
    context.products = cuda_products(dtype, *context.device);
  }
#endif
  return context;
}

// p.winograd and p.grain for a forward kernel of ours.
void prepare_forward(ConvBlockParams& p, Path path, int64_t threads) {
  p.winograd = path == Path::winograd2 ? 2 : path == Path::winograd4 ? 4 : 0;
  const double strip =
      p.winograd == 0 ? 0.0 : static_cast<double>(p.conv.output_size[1] * p.conv.out_channels);
  p.grain = plan_grain(
      p, padded_length(p.conv, 1, p.conv.output_size[1]) * p.conv.group_in() * p.conv.stride[0] + strip,
      threads);
}

// Nothing where Winograd's sums are not finite.
std::optional<std::tuple<Tensor, Tensor>> own_forward(ConvBlockParams p, Dtype dtype, Path path,
                                                      const Tensor& input, const Tensor& weight,
                                                      const std::optional<Tensor>& bias, bool save_code) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = at::get_num_threads();
  prepare_forward(p, path, threads);
  const WeightSteps steps{.out = weight.stride(0),
                          .in = weight.stride(1),
                          .kernel = {weight.stride(2), weight.stride(3)},
                          .group = p.conv.group_out() * weight.stride(0)};
  const Tensor b = bias && bias->defined() ? bias->contiguous() : Tensor();
  Tensor output = empty_output(p.pool, input, input.scalar_type());
  Tensor code = empty_code(p.pool, input, save_code);
  if (output.numel() > 0) {
    const Tensor scratch =
        at::empty({kernels.forward_scratch(p, dtype, threads)}, input.options().dtype(at::kFloat));
    const bool done = kernels.forward(p, steps, dtype, input.const_data_ptr(), weight.const_data_ptr(),
                                      b.defined() ? b.const_data_ptr() : nullptr, output.data_ptr(),
                                      static_cast<uint8_t*>(code_pointer(code)), scratch.data_ptr<float>());
    if (!done) return std::nullopt;
  }
  return std::make_tuple(output, code);
}

std::tuple<Tensor, Tensor> conv_relu_pool2d(const Tensor& input, const Tensor& weight,
                                            const std::optional<Tensor>& bias, IntArrayRef stride,
                                            IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                            OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                                            IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode,
                                            bool save_code) {
  constexpr const char* op = "conv_relu_pool2d";
  const Dtype dtype = check_dtype(op, "input", input);
  check_alike(op, "input", input, "input", input);
  check_alike(op, "weight", weight, "input", input);
  const ConvBlockParams p = check_block(op, input, weight, {stride, padding, dilation, groups},
                                        {activation, pool, pool_size, pool_stride, pool_padding, ceil_mode});
  check_bias(op, bias, p.conv.out_channels, input);

  const c10::OptionalDeviceGuard guard(input.device());
  const PlanContext context = context_of(input, dtype, save_code);
  const std::optional<Tensor> none;
  // Some of PyTorch's convolutions answer in another format than the one that backward will expect.
  const auto convolve = [&](const std::optional<Tensor>& b) {
    return at::conv2d(input, weight, b, stride, padding, dilation, groups).contiguous(format_of(p.pool));
  };
  const auto pass = [&](const Tensor& z, const std::optional<Tensor>& b) {
    return relu_pool2d(z, b, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, save_code);
  };
  if (!input.is_cpu()) {
    // cuDNN's convolution takes a pass of its own for the bias, which ours saves.
    const auto epilogue = [&] { return pass(convolve(none), bias); };
#ifdef DLFAST_WITH_CUDA
    if (context.device != nullptr) {
      const CudaConv c{p, dtype, context.products};
      const auto single = [&] {
        Tensor output = empty_output(p.pool, input, input.scalar_type());
        Tensor code = empty_code(p.pool, input, save_code);
        single_forward(c, input, weight, bias, output, code);
        return std::make_tuple(output, code);
      };
      measure_forward(c, save_code, input, [&] { epilogue(); }, [&] { single(); });
      if (plan_forward(p, context).path() == Path::single) return single();
    }
#endif
    return epilogue();
  }
  const Path path = plan_forward(p, context).path();
  if (path == Path::depthwise) {
    Tensor output = empty_output(p.pool, input, input.scalar_type());
    depthwise_forward(p, dtype, input, weight, bias, output);
    return {output, empty_code(p.pool, input, save_code)};
  }
  if (path != Path::pytorch) {
    if (auto result = own_forward(p, dtype, path, input, weight, bias, save_code)) return *result;
  }
  const Tensor z = convolve(bias);
  if (p.pool.pool == Pool::none && z.numel() > 0) {
    // Nobody else sees z, so that ReLU needs no second tensor.
    if (p.pool.activation == Activation::relu) {
      backend_of(z).forward(p.pool, dtype, z.const_data_ptr(), nullptr, z.data_ptr(), nullptr, nullptr);
    }
    return {z, empty_code(p.pool, z, save_code)};
  }
  return pass(z, none);
}

// What the sparse kernels read, see cpu_kernels.h; code is undefined without pooling.
struct SparseGradient {
  Tensor grad, code;

  const uint8_t* codes() const { return code.defined() ? code.const_data_ptr<uint8_t>() : nullptr; }
};

SparseGradient sparse_gradient(const ReluPoolParams& p, Dtype dtype, const Tensor& grad_output,
                               const Tensor& code) {
  constexpr auto kLast = at::MemoryFormat::ChannelsLast;
  const CpuKernels& kernels = cpu_kernels();
  const int64_t pixels = p.output_size[0] * p.output_size[1];
  const bool masked = p.pool == Pool::none && p.activation == Activation::relu;
  SparseGradient result;
  const bool from_last = grad_output.is_contiguous(kLast);
  const Tensor from = from_last ? grad_output : grad_output.contiguous();
  result.grad = from;
  if (masked || !from_last) {
    result.grad = at::empty(from.sizes(), from.options().memory_format(kLast));
    kernels.to_channels_last(p.batch, p.channels, pixels, dtype, from_last, from.const_data_ptr(),
                             p.channels_last, masked ? code.const_data_ptr() : nullptr,
                             result.grad.data_ptr());
  }
  if (p.pool == Pool::max && p.channels_last) result.code = code;
  if (p.pool == Pool::max && !p.channels_last) {
    result.code = at::empty(code.sizes(), code.options().memory_format(kLast));
    kernels.codes_to_channels_last(p.batch, p.channels, pixels, code.const_data_ptr<uint8_t>(),
                                   result.code.data_ptr<uint8_t>());
  }
  return result;
}

// grad_weight and grad_bias by our kernels; false where they are to be had in the dense way only.
bool own_grad_weight(ConvBlockParams p, Dtype dtype, Path path, const SparseGradient& gradient,
                     const Tensor& input, Tensor& grad_weight, Tensor& grad_bias) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = at::get_num_threads();
  const GradWeightWay way = path == Path::masked ? GradWeightWay::masked
                            : path == Path::rows ? GradWeightWay::rows
                                                 : GradWeightWay::channels;
  // Positions that no window covers get no gradient, and PyTorch's products of 0 and infinity or NaN are made
  // by the dense way only. The sum of what is not finite is not.
  if (!windows_cover(p.pool) && !std::isfinite(at::sum(input, at::kFloat).item<float>())) return false;
  p.grain = grad_weight_grain(p, way, threads);
  const Tensor scratch =
      at::empty({kernels.grad_weight_scratch(p, way, threads)}, input.options().dtype(at::kFloat));
  return kernels.grad_weight(p, way, dtype, input.const_data_ptr(), gradient.grad.const_data_ptr(),
                             gradient.codes(), grad_weight.data_ptr(), grad_bias.data_ptr(),
                             scratch.data_ptr<float>());
}

// grad_weight where nothing was pooled, by Winograd's method: our transforms around PyTorch's matrix
// products.
bool winograd_grad_weight(ConvBlockParams p, Dtype dtype, const SparseGradient& gradient, const Tensor& input,
                          Tensor& grad_weight) {
  constexpr int64_t kElements = 36;  // of a transformed tile
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = at::get_num_threads(), in = p.conv.group_in(), out = p.conv.group_out();
  prepare_forward(p, Path::winograd4, threads);
  const int64_t bands = kernels.weight_bands(p);
  // As many bands at once as half of the bound on scratch leaves room for.
  const auto room = static_cast<int64_t>(kMostScratchFloats) / 2 * threads;
  const int64_t per_band = std::max<int64_t>(1, kElements * kernels.weight_tiles(p, 0, 1) * (in + out));
  const int64_t at_once = std::clamp<int64_t>(room / per_band, 1, bands);
  const auto options = input.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const Tensor scratch = at::empty({kernels.weight_sources_scratch(p, threads)}, options);
  for (int64_t group = 0; group < p.conv.groups; ++group) {
    Tensor sums;  // [36, C, K]
    for (int64_t first = 0; first < bands; first += at_once) {
      const int64_t last = std::min(first + at_once, bands), tiles = kernels.weight_tiles(p, first, last);
      const Tensor inputs = at::empty({kElements, tiles, in}, options);
      const Tensor gradients = at::empty({kElements, tiles, out}, options);
      kernels.weight_sources(p, dtype, group, first, last, input.const_data_ptr(),
                             gradient.grad.const_data_ptr(), inputs.data_ptr<float>(),
                             gradients.data_ptr<float>(), scratch.data_ptr<float>());
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
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = at::get_num_threads();
  p.grain = grad_input_grain(p, threads);
  const Tensor w = weight.contiguous();
  const Tensor scratch =
      at::empty({kernels.grad_input_scratch(p, threads)}, weight.options().dtype(at::kFloat));
  return kernels.grad_input(p, dtype, w.const_data_ptr(), gradient.grad.const_data_ptr(), gradient.codes(),
                            grad_input.data_ptr(), scratch.data_ptr<float>());
}

// grad_input where nothing was pooled: the convolution of the gradient with the kernel turned around.
bool winograd_grad_input(const ConvBlockParams& p, Dtype dtype, const SparseGradient& gradient,
                         const Tensor& weight, Tensor& grad_input) {
  const CpuKernels& kernels = cpu_kernels();
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
  prepare_forward(q, Path::winograd4, threads);
  const Tensor scratch =
      at::empty({kernels.forward_scratch(q, dtype, threads)}, weight.options().dtype(at::kFloat));
  return kernels.forward(q, steps, dtype, grad_z.const_data_ptr(), turned, nullptr, grad_input.data_ptr(),
                         nullptr, scratch.data_ptr<float>());
}

using Mask = std::array<bool, 3>;  // of grad_input, grad_weight, grad_bias
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// What a backward works on, checked.
struct Backward {
  const ConvBlockParams& p;
  Dtype dtype;
  const Tensor& grad_output;
  const Tensor& input;
  const Tensor& weight;
  const Tensor& code;

  Tensor expand() const { return expand_gradient(p.pool, dtype, grad_output, code); }
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
    return cuda_grad_bias(p.pool, dtype, bias_from_pooled() ? grad_output : grad_z, code);
#else
    return nothing(input);
#endif
  }
  // Those that `mask` asks for still, in the dense way.
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
    if (mask[0]) std::get<0>(found) = dense_input;
    if (mask[1]) std::get<1>(found) = dense_weight;
    if (mask[2]) std::get<2>(found) = dense_bias;
    return found;
  }
};

Gradients cpu_backward(const Backward& b, const PlanContext& context, Mask mask) {
  const ConvBlockParams& p = b.p;
  Tensor grad_input = nothing(b.input), grad_weight = nothing(b.input), grad_bias = nothing(b.input);
  const Path weight_path = mask[1] ? plan_grad_weight(p, context).path() : Path::pytorch;
  const Path input_path = mask[0] ? plan_grad_input(p, context).path() : Path::pytorch;
  SparseGradient gradient;
  if (weight_path != Path::pytorch || input_path != Path::pytorch) {
    gradient = sparse_gradient(p.pool, b.dtype, b.grad_output, b.code);
  }
  if (weight_path != Path::pytorch) {
    Tensor own_weight = at::empty(b.weight.sizes(), b.weight.options()).contiguous();
    Tensor own_bias = at::empty({p.conv.out_channels}, b.weight.options());
    const auto compute = [&] {
      if (weight_path == Path::depthwise) {
        depthwise_grad_weight(p, b.dtype, gradient.grad, b.input, own_weight, mask[2] ? own_bias : Tensor());
        return true;
      }
      return weight_path == Path::winograd4
                 ? winograd_grad_weight(p, b.dtype, gradient, b.input, own_weight)
                 : own_grad_weight(p, b.dtype, weight_path, gradient, b.input, own_weight, own_bias);
    };
    if (compute()) {
      grad_weight = own_weight;
      if (mask[2]) grad_bias = weight_path == Path::winograd4 ? gradient.grad.sum({0, 2, 3}) : own_bias;
      mask[1] = mask[2] = false;
    }
  }
  if (input_path != Path::pytorch) {
    Tensor own_input = at::empty(b.input.sizes(), b.input.options().memory_format(format_of(p.pool)));
    const auto compute = [&] {
      if (input_path == Path::depthwise) {
        depthwise_grad_input(p, b.dtype, gradient.grad, b.weight, own_input);
        return true;
      }
      return input_path == Path::sparse ? own_grad_input(p, b.dtype, gradient, b.weight, own_input)
                                        : winograd_grad_input(p, b.dtype, gradient, b.weight, own_input);
    };
    if (compute()) {
      grad_input = own_input;
      mask[0] = false;
    }
  }
  return b.complete({grad_input, grad_weight, grad_bias}, mask);
}

#ifdef DLFAST_WITH_CUDA
Gradients cuda_backward(const Backward& b, const PlanContext& context, Mask mask) {
  const CudaConv c{b.p, b.dtype, context.products};
  const auto own_weight = [&] { return single_grad_weight(c, b.input, b.weight, b.grad_output, b.code); };
  const auto own_input = [&] { return single_grad_input(c, b.input, b.weight, b.grad_output, b.code); };
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
  Tensor grad_input = nothing(b.input), grad_weight = nothing(b.input), grad_bias = nothing(b.input);
  if (mask[1] && plan_grad_weight(b.p, context).path() == Path::single) {
    const auto [own, own_bias] = own_weight();
    grad_weight = own;
    if (mask[2]) grad_bias = own_bias;
    mask[1] = mask[2] = false;
  }
  if (mask[0] && plan_grad_input(b.p, context).path() == Path::single) {
    grad_input = own_input();
    mask[0] = false;
  }
  return b.complete({grad_input, grad_weight, grad_bias}, mask);
}
#endif

std::tuple<Tensor, Tensor, Tensor> conv_relu_pool2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& code,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, OptionalName activation,
    OptionalName pool, IntArrayRef pool_size, IntArrayRef pool_stride, IntArrayRef pool_padding,
    bool ceil_mode, std::array<bool, 3> output_mask) {
  constexpr const char* op = "conv_relu_pool2d_backward";
  const Dtype dtype = check_dtype(op, "input", input);
  check_alike(op, "input", input, "input", input);
  check_alike(op, "weight", weight, "input", input);
  check_alike(op, "grad_output", grad_output, "input", input);
  const ConvBlockParams p = check_block(op, input, weight, {stride, padding, dilation, groups},
                                        {activation, pool, pool_size, pool_stride, pool_padding, ceil_mode});
  check_sizes(op, "grad_output", grad_output,
              {p.conv.batch, p.conv.out_channels, p.pool.output_size[0], p.pool.output_size[1]});
  const c10::OptionalDeviceGuard guard(input.device());
  const Tensor checked = check_code(op, p.pool, code, grad_output);

  const Backward b{p, dtype, grad_output, input, weight, checked};
  PlanContext context = context_of(input, dtype, true);
  context.mask = output_mask;
#ifdef DLFAST_WITH_CUDA
  if (context.device != nullptr) return cuda_backward(b, context, output_mask);
#endif
  return cpu_backward(b, context, output_mask);
}

}  // namespace

bool is_plain_convolution(const Tensor& input, const Tensor& weight, const BlockArgs& block,
                          const PoolArgs& pooling, bool backward) {
  // While somebody traces there may be no sizes, nor numbers.
  const auto has_numbers = [](const Tensor& t) {
    return t.is_cpu() && !t.key_set().has(c10::DispatchKey::Python) &&
           !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (pooling.pool || pooling.activation || !has_numbers(input) || !has_numbers(weight) ||
      input.numel() == 0 || input.dim() != 4) {
    return false;
  }
  constexpr const char* op = "conv_relu_pool2d";
  const Dtype dtype = check_dtype(op, "input", input);
  check_alike(op, "weight", weight, "input", input);
  const ConvBlockParams p = check_block(op, input, weight, block, pooling);
  const PlanContext context = context_of(input, dtype, backward);
  const auto pytorch = [](const Choice& choice) { return choice.path() == Path::pytorch; };
  return pytorch(plan_forward(p, context)) &&
         (!backward || (pytorch(plan_grad_weight(p, context)) && pytorch(plan_grad_input(p, context))));
}

BlockPlan plan_block(const Tensor& input, const Tensor& weight, const BlockArgs& block,
                     const PoolArgs& pooling, bool save_code, std::array<bool, 3> mask) {
  constexpr const char* op = "plan_block";
  const Dtype dtype = check_dtype(op, "input", input);
  const ConvBlockParams p = check_block(op, input, weight, block, pooling);
  const c10::OptionalDeviceGuard guard(input.device());
  PlanContext context = context_of(input, dtype, save_code);
  context.mask = mask;
  BlockPlan plan{.flops = convolution_flops(p.conv),
                 .floor = 0,
                 .forward = plan_forward(p, context),
                 .grad_input = plan_grad_input(p, context),
                 .grad_weight = plan_grad_weight(p, context)};
#ifdef DLFAST_WITH_CUDA
  if (context.device != nullptr) plan.floor = floor_seconds(p, context);
#endif
  return plan;
}

namespace {

void register_all(torch::Library& m) {
  m.impl("_conv_relu_pool2d", conv_relu_pool2d);
  m.impl("_conv_relu_pool2d_backward", conv_relu_pool2d_backward);
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
