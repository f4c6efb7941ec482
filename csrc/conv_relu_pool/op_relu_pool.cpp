// The pass after a convolution on tensors, for CPU and CUDA alike; and what it shares with the whole block.
#include "conv_relu_pool/op_relu_pool.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>

#include "checks.h"
#include "conv_relu_pool/cpu_kernels.h"
#ifdef DLFAST_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace dlfast {

const ReluPoolBackend& relu_pool_cpu() {
  return cpu_kernels().relu_pool;
}

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

Tensor empty_output(const ReluPoolParams& p, const Tensor& like, at::ScalarType dtype) {
  return at::empty({p.batch, p.channels, p.output_size[0], p.output_size[1]},
                   like.options().dtype(dtype).memory_format(format_of(p)));
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

namespace {

Tensor empty_input(const ReluPoolParams& p, const Tensor& like) {
  return at::empty({p.batch, p.channels, p.input_size[0], p.input_size[1]},
                   like.options().memory_format(format_of(p)));
}

}  // namespace

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

namespace {

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

void register_all(torch::Library& m) {
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
