// The operators on tensors, for CPU and CUDA alike: check, allocate, plan, call the backend's kernels.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "checks.h"
#include "conv_relu_pool/op.h"
#include "conv_relu_pool/op_cuda.h"
#include "conv_relu_pool/plan.h"
#ifdef DLFAST_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace dlfast {

const ReluPoolBackend& relu_pool_cpu() {
  return cpu_kernels().relu_pool;
}

namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalName = std::optional<std::string_view>;

const ReluPoolBackend& backend_of([[maybe_unused]] const Tensor& tensor) {
#ifdef DLFAST_WITH_CUDA
  if (tensor.is_cuda()) return relu_pool_cuda();
#endif
  return relu_pool_cpu();
}

void* stream_of([[maybe_unused]] const Tensor& tensor) {
#ifdef DLFAST_WITH_CUDA
  if (tensor.is_cuda()) return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
#endif
  return nullptr;
}

// The memory format PyTorch's convolution gives its output.
at::MemoryFormat convolution_format(const Tensor& input, const Tensor& weight) {
  const auto is_last = [](const Tensor& t) {
    return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  };
  return is_last(input) || is_last(weight) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Tensor empty_output(const ReluPoolParams& p, const Tensor& like, at::ScalarType dtype) {
  return at::empty({p.batch, p.channels, p.output_size[0], p.output_size[1]},
                   like.options().dtype(dtype).memory_format(format_of(p)));
}

Tensor empty_input(const ReluPoolParams& p, const Tensor& like) {
  return at::empty({p.batch, p.channels, p.input_size[0], p.input_size[1]},
                   like.options().memory_format(format_of(p)));
}

Tensor nothing(const Tensor& like) {
  return at::empty({0}, like.options());
}

// The code backward needs, uninitialised; an empty tensor where it needs none (see params.h).
Tensor empty_code(const ReluPoolParams& p, const Tensor& like, bool save_code) {
  if (save_code && p.pool == Pool::max) return empty_output(p, like, p.wide_code() ? at::kInt : at::kByte);
  if (save_code && p.pool == Pool::avg && p.activation == Activation::relu) {
    return at::empty({(p.input_numel() + 7) / 8}, like.options().dtype(at::kByte));
  }
  return at::empty({0}, like.options().dtype(at::kByte));
}

void* code_pointer(const Tensor& code) {
  return code.numel() == 0 ? nullptr : code.data_ptr();
}

// `code` is what forward gave for this problem, in the layout of y.
Tensor check_code(const char* op, const ReluPoolParams& p, const Tensor& code, const Tensor& like) {
  TORCH_CHECK(code.device() == like.device(), op, ": code must be on the device of the gradient (",
              like.device(), "), got ", code.device());
  const std::array<int64_t, 4> output = {p.batch, p.channels, p.output_size[0], p.output_size[1]};
  switch (p.pool) {
    case Pool::none:
      if (p.activation == Activation::none) return nothing(like);
      check_alike(op, "code", code, "grad_output", like);
      check_sizes(op, "code", code, output);
      return code.contiguous(format_of(p));
    case Pool::max:
      TORCH_CHECK(code.scalar_type() == (p.wide_code() ? at::kInt : at::kByte), op,
                  ": code must be uint8 for windows of up to 255 positions and int32 beyond, got ",
                  code.scalar_type());
      check_sizes(op, "code", code, output);
      return code.contiguous(format_of(p));
    case Pool::avg:
      if (p.activation == Activation::none) return nothing(like);
      TORCH_CHECK(code.scalar_type() == at::kByte, op, ": code must be uint8, got ", code.scalar_type());
      check_sizes(op, "code", code, {(p.input_numel() + 7) / 8});
      return code.contiguous();
  }
  return code;
}

// ---- The pass after a convolution -------------------------------------------------------------------

std::tuple<Tensor, Tensor> relu_pool2d(const Tensor& input, const std::optional<Tensor>& bias,
                                       OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                                       IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode,
                                       bool save_code) {
  constexpr const char* op = "relu_pool2d";
  TORCH_CHECK(input.dim() == 4, op, ": input must have shape [N, C, H, W], got ", input.sizes());
  const Dtype dtype = check_dtype(op, "input", input);
  check_alike(op, "input", input, "input", input);
  check_bias(op, bias, input.size(1), input);
  const bool last = input.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const ReluPoolParams p = check_pooling(
      op, input.sizes(), {activation, pool, pool_size, pool_stride, pool_padding, ceil_mode}, last);

  const c10::OptionalDeviceGuard guard(input.device());
  const Tensor z = input.contiguous(format_of(p));
  const Tensor b = bias && bias->defined() ? bias->contiguous() : Tensor();
  Tensor output = empty_output(p, input, input.scalar_type());
  Tensor code = empty_code(p, input, save_code);
  if (output.numel() > 0) {
    backend_of(input).forward(p, dtype, z.const_data_ptr(), b.defined() ? b.const_data_ptr() : nullptr,
                              output.data_ptr(), code_pointer(code), stream_of(input));
  }
  return {output, code};
}

// grad_z, in the layout of p; grad_output and code have been checked.
Tensor expand_gradient(const ReluPoolParams& p, Dtype dtype, const Tensor& grad_output, const Tensor& code) {
  if (p.pool == Pool::none && p.activation == Activation::none) return grad_output;
  if (p.pool == Pool::none && grad_output.is_cpu()) return at::threshold_backward(grad_output, code, 0);
  const Tensor grad = grad_output.contiguous(format_of(p));
  Tensor grad_z = empty_input(p, grad_output);
  if (grad_z.numel() > 0) {
    backend_of(grad_output)
        .backward(p, dtype, grad.const_data_ptr(), code_pointer(code), grad_z.data_ptr(),
                  stream_of(grad_output));
  }
  return grad_z;
}

// The code of these two tells the layout; without one the gradient does.
bool channels_last_of(const Tensor& code, const Tensor& grad) {
  const Tensor& tensor = code.dim() == 4 ? code : grad;
  return tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

Tensor relu_pool2d_backward(const Tensor& grad_output, const Tensor& code, IntArrayRef input_size,
                            OptionalName activation, OptionalName pool, IntArrayRef pool_size,
                            IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode) {
  constexpr const char* op = "relu_pool2d_backward";
  TORCH_CHECK(grad_output.dim() == 4, op, ": grad_output must have shape [N, C, PH, PW], got ",
              grad_output.sizes());
  const Dtype dtype = check_dtype(op, "grad_output", grad_output);
  check_pair(op, "input_size", input_size, 1);
  const std::array<int64_t, 4> sizes = {grad_output.size(0), grad_output.size(1), input_size[0],
                                        input_size[1]};
  const ReluPoolParams p =
      check_pooling(op, sizes, {activation, pool, pool_size, pool_stride, pool_padding, ceil_mode},
                    channels_last_of(code, grad_output));
  check_sizes(op, "grad_output", grad_output, {p.batch, p.channels, p.output_size[0], p.output_size[1]});
  const c10::OptionalDeviceGuard guard(grad_output.device());
  return expand_gradient(p, dtype, grad_output, check_code(op, p, code, grad_output)).clone();
}

Tensor relu_pool2d_transpose(const Tensor& grad_input, const Tensor& code, OptionalName activation,
                             OptionalName pool, IntArrayRef pool_size, IntArrayRef pool_stride,
                             IntArrayRef pool_padding, bool ceil_mode) {
  constexpr const char* op = "relu_pool2d_transpose";
  TORCH_CHECK(grad_input.dim() == 4, op, ": grad_input must have shape [N, C, H, W], got ",
              grad_input.sizes());
  const Dtype dtype = check_dtype(op, "grad_input", grad_input);
  const ReluPoolParams p = check_pooling(op, grad_input.sizes(),
                                         {activation, pool, pool_size, pool_stride, pool_padding, ceil_mode},
                                         channels_last_of(code, grad_input));
  const Tensor checked = check_code(op, p, code, grad_input);
  if (p.pool == Pool::none && p.activation == Activation::none) return grad_input.clone();
  const c10::OptionalDeviceGuard guard(grad_input.device());
  const Tensor grad = grad_input.contiguous(format_of(p));
  Tensor grad_y = empty_output(p, grad_input, grad_input.scalar_type());
  if (grad_y.numel() > 0) {
    backend_of(grad_input)
        .transpose(p, dtype, grad.const_data_ptr(), code_pointer(checked), grad_y.data_ptr(),
                   stream_of(grad_input));
  }
  return grad_y;
}

// ---- The whole block ----------------------------------------------------------------------------------

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
  const Tensor w = weight.contiguous();
  const Tensor b = bias && bias->defined() ? bias->contiguous() : Tensor();
  Tensor output = empty_output(p.pool, input, input.scalar_type());
  Tensor code = empty_code(p.pool, input, save_code);
  if (output.numel() > 0) {
    const Tensor scratch =
        at::empty({kernels.forward_scratch(p, dtype, threads)}, input.options().dtype(at::kFloat));
    const bool done = kernels.forward(p, dtype, input.const_data_ptr(), w.const_data_ptr(),
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
  const Path path = plan_forward(p, context).path();
#ifdef DLFAST_WITH_CUDA
  if (path == Path::single) {
    Tensor output = empty_output(p.pool, input, input.scalar_type());
    Tensor code = empty_code(p.pool, input, save_code);
    single_forward({p, dtype, context.products}, input, weight, bias, output, code);
    return {output, code};
  }
#endif
  if (path != Path::pytorch) {
    if (auto result = own_forward(p, dtype, path, input, weight, bias, save_code)) return *result;
  }
  // The CPU's convolution adds the bias for nothing; cuDNN's takes a pass of its own, which ours saves.
  const bool bias_later = !input.is_cpu();
  const std::optional<Tensor> none;
  // Some of PyTorch's convolutions answer in another format than the one that backward will expect.
  const Tensor z = at::conv2d(input, weight, bias_later ? none : bias, stride, padding, dilation, groups)
                       .contiguous(format_of(p.pool));
  if (input.is_cpu() && p.pool.pool == Pool::none && z.numel() > 0) {
    // Nobody else sees z, so that ReLU needs no second tensor.
    if (p.pool.activation == Activation::relu) {
      backend_of(z).forward(p.pool, dtype, z.const_data_ptr(), nullptr, z.data_ptr(), nullptr, nullptr);
    }
    return {z, empty_code(p.pool, z, save_code)};
  }
  return relu_pool2d(z, bias_later ? bias : none, activation, pool, pool_size, pool_stride, pool_padding,
                     ceil_mode, save_code);
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
  const bool patches = path == Path::patches;
  const int64_t taps = p.conv.positions() * p.conv.in_channels;
  const double per_position = static_cast<double>(patches ? taps : p.conv.group_out() / 2);
  p.grain =
      plan_grain(p,
                 padded_length(p.conv, 1, p.conv.output_size[1]) * p.conv.group_in() * p.conv.stride[0] +
                     p.conv.output_size[1] * per_position,
                 threads);
  const Tensor scratch =
      at::empty({kernels.grad_weight_scratch(p, patches, threads)}, input.options().dtype(at::kFloat));
  return kernels.grad_weight(p, patches, dtype, input.const_data_ptr(), gradient.grad.const_data_ptr(),
                             gradient.codes(), grad_weight.data_ptr(), grad_bias.data_ptr(),
                             scratch.data_ptr<float>());
}

bool own_grad_input(ConvBlockParams p, Dtype dtype, const SparseGradient& gradient, const Tensor& weight,
                    Tensor& grad_input) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = at::get_num_threads();
  p.grain =
      plan_grain(p,
                 padded_length(p.conv, 1, p.conv.output_size[1]) * p.conv.group_in() * p.conv.stride[0] +
                     static_cast<double>(p.conv.output_size[1] * p.conv.group_out()),
                 threads);
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
  const int64_t groups = p.conv.groups;
  const Tensor turned = weight.contiguous()
                            .view({groups, p.conv.group_out(), p.conv.group_in(), 3, 3})
                            .transpose(1, 2)
                            .reshape({p.conv.in_channels, p.conv.group_out(), 3, 3})
                            .flip({2, 3})
                            .contiguous();
  ConvBlockParams q = p;
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
  return kernels.forward(q, dtype, grad_z.const_data_ptr(), turned.const_data_ptr(), nullptr,
                         grad_input.data_ptr(), nullptr, scratch.data_ptr<float>());
}

// A kernel of ours for the CPU.
bool on_cpu(Path path) {
  return path != Path::pytorch && path != Path::single;
}

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

  Tensor grad_input = nothing(input), grad_weight = nothing(input), grad_bias = nothing(input);
  auto [needs_input, needs_weight, needs_bias] = output_mask;
  const PlanContext context = context_of(input, dtype, true);
  const Path weight_path = needs_weight ? plan_grad_weight(p, context).path() : Path::pytorch;
  const Path input_path = needs_input ? plan_grad_input(p, context).path() : Path::pytorch;
#ifdef DLFAST_WITH_CUDA
  const CudaConv c{p, dtype, context.products};
  if (weight_path == Path::single) {
    std::tie(grad_weight, grad_bias) = single_grad_weight(c, input, weight, grad_output, checked);
    needs_weight = needs_bias = false;
  }
  if (input_path == Path::single) {
    grad_input = single_grad_input(c, input, weight, grad_output, checked);
    needs_input = false;
  }
#endif
  SparseGradient gradient;
  if (on_cpu(weight_path) || on_cpu(input_path)) {
    gradient = sparse_gradient(p.pool, dtype, grad_output, checked);
  }
  if (on_cpu(weight_path)) {
    Tensor own_weight = at::empty(weight.sizes(), weight.options()).contiguous();
    Tensor own_bias = at::empty({p.conv.out_channels}, weight.options());
    if (own_grad_weight(p, dtype, weight_path, gradient, input, own_weight, own_bias)) {
      grad_weight = own_weight;
      if (needs_bias) grad_bias = own_bias;
      needs_weight = needs_bias = false;
    }
  }
  if (on_cpu(input_path)) {
    Tensor own_input = at::empty(input.sizes(), input.options().memory_format(format_of(p.pool)));
    const bool done = input_path == Path::sparse ? own_grad_input(p, dtype, gradient, weight, own_input)
                                                 : winograd_grad_input(p, dtype, gradient, weight, own_input);
    if (done) {
      grad_input = own_input;
      needs_input = false;
    }
  }
  if (!needs_input && !needs_weight && !needs_bias) return {grad_input, grad_weight, grad_bias};

  const Tensor grad_z = expand_gradient(p.pool, dtype, grad_output, checked);
  const auto [dense_input, dense_weight, dense_bias] = at::convolution_backward(
      grad_z, input, weight, at::IntArrayRef(&p.conv.out_channels, 1), stride, padding, dilation,
      /*transposed=*/false, /*output_padding=*/{0, 0}, groups, {needs_input, needs_weight, needs_bias});
  if (needs_input) grad_input = dense_input;
  if (needs_weight) grad_weight = dense_weight;
  if (needs_bias) grad_bias = dense_bias;
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

BlockPlan plan_block(const Tensor& input, const Tensor& weight, const BlockArgs& block,
                     const PoolArgs& pooling, bool save_code) {
  constexpr const char* op = "plan_block";
  const Dtype dtype = check_dtype(op, "input", input);
  const ConvBlockParams p = check_block(op, input, weight, block, pooling);
  const PlanContext context = context_of(input, dtype, save_code);
  return {convolution_flops(p.conv), plan_forward(p, context), plan_grad_input(p, context),
          plan_grad_weight(p, context)};
}

namespace {

void register_all(torch::Library& m) {
  m.impl("_conv_relu_pool2d", conv_relu_pool2d);
  m.impl("_conv_relu_pool2d_backward", conv_relu_pool2d_backward);
  m.impl("_relu_pool2d", relu_pool2d);
  m.impl("_relu_pool2d_backward", relu_pool2d_backward);
  m.impl("_relu_pool2d_transpose", relu_pool2d_transpose);
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
