// The pass of activation and pooling on tensors, for CPU and CUDA alike.
#include "pool/op.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "core/ran.h"
#ifdef DLFAST_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace dlfast {

using at::IntArrayRef;
using at::Tensor;

const PoolKernels& pool_kernels([[maybe_unused]] const Tensor& tensor) {
#ifdef DLFAST_WITH_CUDA
  if (tensor.is_cuda()) return pool_cuda();
#endif
  return pool_cpu();
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

namespace {

// Of the winner mask of an average: its bits are in the memory order of z, which its shape tells.
std::vector<int64_t> mask_sizes(const ReluPoolParams& p) {
  const int64_t bytes = (p.input_numel() + 7) / 8;
  return p.channels_last ? std::vector<int64_t>{bytes, 1} : std::vector<int64_t>{bytes};
}

}  // namespace

Tensor empty_winner_mask(const ReluPoolParams& p, const Tensor& like, bool save_winner_mask) {
  if (save_winner_mask && p.pool == Pool::max) {
    return empty_output(p, like, p.wide_winner_mask() ? at::kInt : at::kByte);
  }
  if (save_winner_mask && p.pool == Pool::avg && p.activation == Activation::relu) {
    return at::empty(mask_sizes(p), like.options().dtype(at::kByte));
  }
  return at::empty({0}, like.options().dtype(at::kByte));
}

void* winner_mask_pointer(const Tensor& winner_mask) {
  return winner_mask.numel() == 0 ? nullptr : winner_mask.data_ptr();
}

Tensor check_winner_mask(const char* op, const ReluPoolParams& p, const Tensor& winner_mask,
                         const Tensor& like) {
  TORCH_CHECK(winner_mask.device() == like.device(), op,
              ": winner_mask must be on the device of the gradient (", like.device(), "), got ",
              winner_mask.device());
  const std::array<int64_t, 4> output = {p.batch, p.channels, p.output_size[0], p.output_size[1]};
  switch (p.pool) {
    case Pool::none:
      if (p.activation == Activation::none) return nothing(like);
      check_alike(op, "winner_mask", winner_mask, "grad_output", like);
      check_sizes(op, "winner_mask", winner_mask, output);
      return winner_mask.contiguous(format_of(p));
    case Pool::max:
      TORCH_CHECK(winner_mask.scalar_type() == (p.wide_winner_mask() ? at::kInt : at::kByte), op,
                  ": winner_mask must be uint8 for windows of up to 255 positions and int32 beyond, got ",
                  winner_mask.scalar_type());
      check_sizes(op, "winner_mask", winner_mask, output);
      return winner_mask.contiguous(format_of(p));
    case Pool::avg:
      if (p.activation == Activation::none) return nothing(like);
      TORCH_CHECK(winner_mask.scalar_type() == at::kByte, op, ": winner_mask must be uint8, got ",
                  winner_mask.scalar_type());
      check_sizes(op, "winner_mask", winner_mask, mask_sizes(p));
      return winner_mask.contiguous();
  }
  return winner_mask;
}

namespace {

enum Part { kForward, kBackward, kTranspose };

void count(const Tensor& tensor, Part part) {
  static RanTable table("relu_pool2d", {"forward", "backward", "transpose"}, {"pass"});
  table.add(tensor.is_cuda(), part, 0);
}

bool is_channels_last(const Tensor& tensor) {
  return tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

// The winner mask tells the layout of z, by its strides or by its shape; without one the gradient does.
bool channels_last_of(const Tensor& winner_mask, const Tensor& grad) {
  if (winner_mask.dim() == 4) return is_channels_last(winner_mask);
  return winner_mask.numel() > 0 ? winner_mask.dim() == 2 : is_channels_last(grad);
}

}  // namespace

std::tuple<Tensor, Tensor> relu_pool2d_in(bool channels_last, const Tensor& input, const OptionalTensor& bias,
                                          const PoolOptions& options, bool save_winner_mask) {
  constexpr const char* op = "relu_pool2d";
  TORCH_CHECK(input.dim() == 4, op, ": input must have shape [N, C, H, W], got ", input.sizes());
  const Dtype dtype = check_dtype(op, "input", input);
  check_alike(op, "input", input, "input", input);
  check_bias(op, bias, input.size(1), input);
  const ReluPoolParams p = params_of(op, options, input.sizes(), channels_last);

  const c10::OptionalDeviceGuard guard(input.device());
  const Tensor z = input.contiguous(format_of(p));
  const Tensor b = is_given(bias) ? bias->contiguous() : Tensor();
  Tensor output = empty_output(p, input, input.scalar_type());
  Tensor winner_mask = empty_winner_mask(p, input, save_winner_mask);
  if (output.numel() > 0) {
    pool_kernels(input).forward(p, dtype, z.const_data_ptr(), b.defined() ? b.const_data_ptr() : nullptr,
                                output.data_ptr(), winner_mask_pointer(winner_mask), stream_of(input));
    count(input, kForward);
  }
  return {output, winner_mask};
}

Tensor expand_gradient(const ReluPoolParams& p, Dtype dtype, const Tensor& grad_output,
                       const Tensor& winner_mask) {
  if (p.is_nothing()) return grad_output;
  if (p.pool == Pool::none && grad_output.is_cpu())
    return at::threshold_backward(grad_output, winner_mask, 0);
  const Tensor grad = grad_output.contiguous(format_of(p));
  Tensor grad_z = at::empty({p.batch, p.channels, p.input_size[0], p.input_size[1]},
                            grad_output.options().memory_format(format_of(p)));
  if (grad_z.numel() > 0) {
    pool_kernels(grad_output)
        .backward(p, dtype, grad.const_data_ptr(), winner_mask_pointer(winner_mask), grad_z.data_ptr(),
                  stream_of(grad_output));
    count(grad_output, kBackward);
  }
  return grad_z;
}

namespace {

std::tuple<Tensor, Tensor> relu_pool2d(const Tensor& input, const OptionalTensor& bias,
                                       const PoolOptions& options, bool save_winner_mask) {
  return relu_pool2d_in(is_channels_last(input), input, bias, options, save_winner_mask);
}

Tensor relu_pool2d_backward(const Tensor& grad_output, const Tensor& winner_mask, IntArrayRef input_size,
                            const PoolOptions& options) {
  constexpr const char* op = "relu_pool2d_backward";
  TORCH_CHECK(grad_output.dim() == 4, op, ": grad_output must have shape [N, C, PH, PW], got ",
              grad_output.sizes());
  const Dtype dtype = check_dtype(op, "grad_output", grad_output);
  check_pair(op, "input_size", input_size, 1);
  const std::array<int64_t, 4> sizes = {grad_output.size(0), grad_output.size(1), input_size[0],
                                        input_size[1]};
  const ReluPoolParams p = params_of(op, options, sizes, channels_last_of(winner_mask, grad_output));
  check_sizes(op, "grad_output", grad_output, {p.batch, p.channels, p.output_size[0], p.output_size[1]});
  const c10::OptionalDeviceGuard guard(grad_output.device());
  return expand_gradient(p, dtype, grad_output, check_winner_mask(op, p, winner_mask, grad_output)).clone();
}

Tensor relu_pool2d_transpose(const Tensor& grad_input, const Tensor& winner_mask,
                             const PoolOptions& options) {
  constexpr const char* op = "relu_pool2d_transpose";
  TORCH_CHECK(grad_input.dim() == 4, op, ": grad_input must have shape [N, C, H, W], got ",
              grad_input.sizes());
  const Dtype dtype = check_dtype(op, "grad_input", grad_input);
  const ReluPoolParams p =
      params_of(op, options, grad_input.sizes(), channels_last_of(winner_mask, grad_input));
  const Tensor checked = check_winner_mask(op, p, winner_mask, grad_input);
  if (p.is_nothing()) return grad_input.clone();
  const c10::OptionalDeviceGuard guard(grad_input.device());
  const Tensor grad = grad_input.contiguous(format_of(p));
  Tensor grad_y = empty_output(p, grad_input, grad_input.scalar_type());
  if (grad_y.numel() > 0) {
    pool_kernels(grad_input)
        .transpose(p, dtype, grad.const_data_ptr(), winner_mask_pointer(checked), grad_y.data_ptr(),
                   stream_of(grad_input));
    count(grad_input, kTranspose);
  }
  return grad_y;
}

void register_all(torch::Library& m) {
  m.impl("_relu_pool2d", kernel_of<"relu_pool2d", relu_pool2d>);
  m.impl("_relu_pool2d_backward", kernel_of<"relu_pool2d_backward", relu_pool2d_backward>);
  m.impl("_relu_pool2d_transpose", kernel_of<"relu_pool2d_transpose", relu_pool2d_transpose>);
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
