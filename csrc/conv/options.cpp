#include "conv/options.h"

#include <array>
#include <vector>

#include "core/checks.h"

namespace dlfast {

using at::IntArrayRef;
using at::Tensor;

ConvOptions conv_options(const char* op, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         int64_t groups) {
  ConvOptions o{};
  read_pair(op, "stride", stride, 1, o.stride);
  read_pair(op, "padding", padding, 0, o.padding);
  read_pair(op, "dilation", dilation, 1, o.dilation);
  TORCH_CHECK(groups > 0, op, ": groups must be positive, got ", groups);
  o.groups = groups;
  return o;
}

namespace {

// The memory format PyTorch's convolution gives its output.
bool answers_channels_last(const Tensor& input, const Tensor& weight) {
  const auto is_last = [](const Tensor& t) {
    return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  };
  return is_last(input) || is_last(weight);
}

ConvParams convolution_of(const char* op, const ConvOptions& options, const Tensor& input,
                          const Tensor& weight) {
  TORCH_CHECK(input.dim() == 4, op, ": input must have shape [N, C, H, W] or [C, H, W], got ", input.sizes());
  TORCH_CHECK(weight.dim() == 4, op,
              ": weight must have shape [out_channels, in_channels / groups, kh, kw], got ", weight.sizes());
  for (const int64_t size : weight.sizes()) {
    TORCH_CHECK(size > 0, op, ": weight must have no dimension of size 0, got ", weight.sizes());
  }
  TORCH_CHECK(weight.size(0) % options.groups == 0, op,
              ": groups must divide the output channels, got groups=", options.groups, " for weight ",
              weight.sizes());
  TORCH_CHECK(input.size(1) == weight.size(1) * options.groups, op, ": input must have ",
              weight.size(1) * options.groups, " channels for weight ", weight.sizes(),
              " with groups=", options.groups, ", got input ", input.sizes());
  ConvParams p{};
  static_cast<ConvOptions&>(p) = options;
  p.batch = input.size(0);
  p.in_channels = input.size(1);
  p.out_channels = weight.size(0);
  for (const int axis : {0, 1}) {
    p.input_size[axis] = input.size(2 + axis);
    p.kernel[axis] = weight.size(2 + axis);
    TORCH_CHECK(p.input_size[axis] > 0, op, ": input must have no empty dimension but the batch, got ",
                input.sizes());
    const int64_t padded = p.input_size[axis] + 2 * p.padding[axis];
    const int64_t reach = p.dilation[axis] * (p.kernel[axis] - 1) + 1;
    TORCH_CHECK(reach <= padded, op, ": weight ", weight.sizes(), " with dilation ",
                IntArrayRef(p.dilation, 2), " is larger than the padded input, got input ", input.sizes(),
                " with padding ", IntArrayRef(p.padding, 2));
    p.output_size[axis] = (padded - reach) / p.stride[axis] + 1;
  }
  return p;
}

}  // namespace

ConvBlockParams params_of(const char* op, const BlockOptions& options, const Tensor& input,
                          const Tensor& weight) {
  ConvBlockParams p{};
  p.conv = convolution_of(op, options.conv, input, weight);
  const std::array<int64_t, 4> sizes = {p.conv.batch, p.conv.out_channels, p.conv.output_size[0],
                                        p.conv.output_size[1]};
  p.pool = params_of(op, options.pool, sizes, answers_channels_last(input, weight));
  for (const int axis : {0, 1, 2, 3}) p.input_strides[axis] = input.stride(axis);
  return p;
}

ChosenAlgorithms SchemaArgs<const ChosenAlgorithms&>::from_schema(const char* op, IntArrayRef algorithms) {
  TORCH_CHECK(algorithms.size() == 3, op, ": algorithms must be three numbers, got ", algorithms);
  ChosenAlgorithms chosen;
  for (int part = 0; part < 3; ++part) {
    TORCH_CHECK_VALUE(algorithms[part] >= ChosenAlgorithms::kNotChosen && algorithms[part] < kAlgorithms, op,
                      ": algorithms must be between -1 (not chosen) and ", kAlgorithms - 1, ", got ",
                      algorithms);
    chosen.of[part] = algorithms[part];
  }
  return chosen;
}

}  // namespace dlfast
