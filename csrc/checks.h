// Argument checks, written once: every operator and backend calls these before it touches memory.
// A message names the operator and the argument, what came and what is accepted.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>
#include <string_view>

#include "conv_relu_pool/params.h"
#include "conv_relu_pool/relu_pool.h"

namespace dlfast {

// The geometry of a block as the schemas carry it, in ints.
struct BlockArgs {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

struct PoolArgs {
  std::optional<std::string_view> activation, pool;
  at::IntArrayRef size, stride, padding;
  bool ceil_mode;
};

inline Activation check_activation(const char* op, std::optional<std::string_view> name) {
  if (!name) return Activation::none;
  TORCH_CHECK_VALUE(*name == "relu", op, ": activation must be 'relu' or None, got '", *name, "'");
  return Activation::relu;
}

inline Pool check_pool(const char* op, std::optional<std::string_view> name) {
  if (!name) return Pool::none;
  TORCH_CHECK_VALUE(*name == "max" || *name == "avg", op, ": pool must be 'max', 'avg' or None, got '", *name,
                    "'");
  return *name == "max" ? Pool::max : Pool::avg;
}

// A pair of ints within [least, 2^31), so that no product of a few of them overflows unnoticed.
inline void check_pair(const char* op, const char* name, at::IntArrayRef value, int64_t least) {
  TORCH_CHECK(value.size() == 2, op, ": ", name, " must be an int or a pair of ints, got ", value);
  for (const int64_t v : value) {
    TORCH_CHECK(v >= least && v <= std::numeric_limits<int32_t>::max(), op, ": ", name, " must be at least ",
                least, " and less than 2**31, got ", value);
  }
}

inline Dtype check_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": ", name,
                                  " must be float32, float64, bfloat16 or float16, got ",
                                  tensor.scalar_type());
  }
}

// `tensor` is a strided tensor on the device and of the dtype of `like`.
inline void check_alike(const char* op, const char* name, const at::Tensor& tensor, const char* like_name,
                        const at::Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the device of ", like_name, " (",
              like.device(), "), got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ",
              like_name, " (", like.scalar_type(), "), got ", tensor.scalar_type());
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, got layout ",
              tensor.layout());
}

inline void check_bias(const char* op, const std::optional<at::Tensor>& bias, int64_t channels,
                       const at::Tensor& like) {
  if (!bias || !bias->defined()) return;
  check_alike(op, "bias", *bias, "input", like);
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, op, ": bias must have shape [", channels,
              "], one number per output channel, got ", bias->sizes());
}

inline void check_sizes(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.sizes() == sizes, op, ": ", name, " must have shape ", sizes, ", got ", tensor.sizes());
}

// Output size of a pooling along one axis, as PyTorch has it: with ceil_mode the last window must start
// inside the input or its leading padding.
inline int64_t pooled_size(int64_t input, int64_t size, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t span = input + 2 * padding - size + (ceil_mode ? stride - 1 : 0);
  if (span < 0) return 0;
  int64_t output = span / stride + 1;
  if (ceil_mode && (output - 1) * stride >= input + padding) --output;
  return output;
}

// The pooling of a convolution output [N, C, H, W].
inline ReluPoolParams check_pooling(const char* op, at::IntArrayRef input_sizes, const PoolArgs& args,
                                    bool channels_last) {
  ReluPoolParams p{};
  p.activation = check_activation(op, args.activation);
  p.pool = check_pool(op, args.pool);
  p.batch = input_sizes[0];
  p.channels = input_sizes[1];
  p.channels_last = channels_last;
  for (const int axis : {0, 1}) p.input_size[axis] = input_sizes[2 + axis];
  check_pair(op, "pool_size", args.size, 1);
  check_pair(op, "pool_stride", args.stride, 1);
  check_pair(op, "pool_padding", args.padding, 0);
  TORCH_CHECK(args.size[0] * args.size[1] <= std::numeric_limits<int32_t>::max(), op,
              ": pool_size must have less than 2**31 positions, got ", args.size);
  for (const int axis : {0, 1}) {
    if (p.pool == Pool::none) {
      p.window.size[axis] = p.window.stride[axis] = 1;
      p.output_size[axis] = p.input_size[axis];
      continue;
    }
    p.window.size[axis] = args.size[axis];
    p.window.stride[axis] = args.stride[axis];
    p.window.padding[axis] = args.padding[axis];
    TORCH_CHECK(2 * args.padding[axis] <= args.size[axis], op,
                ": pool_padding must be at most half of pool_size, got ", args.padding, " for pool_size ",
                args.size);
    p.output_size[axis] = pooled_size(p.input_size[axis], args.size[axis], args.stride[axis],
                                      args.padding[axis], args.ceil_mode);
  }
  TORCH_CHECK(p.output_size[0] > 0 && p.output_size[1] > 0, op, ": pool_size ", args.size,
              " is larger than the padded convolution output of ", p.input_size[0], "x", p.input_size[1]);
  return p;
}

// A convolution of a batched input. Checks shapes only; dtypes and devices are check_alike's.
inline ConvParams check_convolution(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                    const BlockArgs& args) {
  TORCH_CHECK(input.dim() == 4, op, ": input must have shape [N, C, H, W] or [C, H, W], got ", input.sizes());
  TORCH_CHECK(weight.dim() == 4, op,
              ": weight must have shape [out_channels, in_channels / groups, kh, kw], got ", weight.sizes());
  check_pair(op, "stride", args.stride, 1);
  check_pair(op, "padding", args.padding, 0);
  check_pair(op, "dilation", args.dilation, 1);
  for (const int64_t size : weight.sizes()) {
    TORCH_CHECK(size > 0, op, ": weight must have no dimension of size 0, got ", weight.sizes());
  }
  TORCH_CHECK(args.groups > 0, op, ": groups must be positive, got ", args.groups);
  TORCH_CHECK(weight.size(0) % args.groups == 0, op,
              ": groups must divide the output channels, got groups=", args.groups, " for weight ",
              weight.sizes());
  TORCH_CHECK(input.size(1) == weight.size(1) * args.groups, op, ": input must have ",
              weight.size(1) * args.groups, " channels for weight ", weight.sizes(),
              " with groups=", args.groups, ", got input ", input.sizes());
  ConvParams p{};
  p.batch = input.size(0);
  p.in_channels = input.size(1);
  p.out_channels = weight.size(0);
  p.groups = args.groups;
  for (const int axis : {0, 1}) {
    p.input_size[axis] = input.size(2 + axis);
    p.kernel[axis] = weight.size(2 + axis);
    p.stride[axis] = args.stride[axis];
    p.padding[axis] = args.padding[axis];
    p.dilation[axis] = args.dilation[axis];
    TORCH_CHECK(p.input_size[axis] > 0, op, ": input must have no empty dimension but the batch, got ",
                input.sizes());
    const int64_t padded = p.input_size[axis] + 2 * p.padding[axis];
    const int64_t reach = p.dilation[axis] * (p.kernel[axis] - 1) + 1;
    TORCH_CHECK(reach <= padded, op, ": weight ", weight.sizes(), " with dilation ", args.dilation,
                " is larger than the padded input, got input ", input.sizes(), " with padding ",
                args.padding);
    p.output_size[axis] = (padded - reach) / p.stride[axis] + 1;
  }
  return p;
}

// The layout of a block's tensors.
inline at::MemoryFormat format_of(const ReluPoolParams& p) {
  return p.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

}  // namespace dlfast
