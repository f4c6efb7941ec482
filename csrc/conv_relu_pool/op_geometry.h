// The arguments of the block operator, as autograd keeps them and measurements tell them apart.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <string_view>
#include <vector>

namespace dlfast {

using OptionalName = std::optional<std::string_view>;
using OptionalTensor = std::optional<at::Tensor>;

// The arguments between the tensors and the flags, as one value that autograd can keep.
struct Geometry {
  using Pair = std::array<int64_t, 2>;
  Pair stride, padding, dilation;
  int64_t groups;
  OptionalName activation, pool;
  Pair pool_size, pool_stride, pool_padding;
  bool ceil_mode;

  static Pair pair(const char* name, at::IntArrayRef value) {
    TORCH_CHECK(value.size() == 2, "conv_relu_pool2d: ", name, " must be an int or a pair of ints, got ",
                value);
    return {value[0], value[1]};
  }

  static Geometry of(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     int64_t groups, OptionalName activation, OptionalName pool, at::IntArrayRef pool_size,
                     at::IntArrayRef pool_stride, at::IntArrayRef pool_padding, bool ceil_mode) {
    return {pair("stride", stride),
            pair("padding", padding),
            pair("dilation", dilation),
            groups,
            activation,
            pool,
            pair("pool_size", pool_size),
            pair("pool_stride", pool_stride),
            pair("pool_padding", pool_padding),
            ceil_mode};
  }

  void save(torch::autograd::AutogradContext* ctx) const {
    const int64_t activation_code = activation ? 1 : 0, pool_code = !pool ? 0 : *pool == "avg" ? 2 : 1;
    ctx->saved_data["geometry"] = std::vector<int64_t>{
        stride[0],    stride[1],       padding[0],     padding[1],     dilation[0],     dilation[1],
        pool_size[0], pool_size[1],    pool_stride[0], pool_stride[1], pool_padding[0], pool_padding[1],
        groups,       activation_code, pool_code,      ceil_mode};
  }
  static Geometry restore(torch::autograd::AutogradContext* ctx) {
    const std::vector<int64_t> v = ctx->saved_data["geometry"].toIntVector();
    const OptionalName none, max = "max", avg = "avg", relu = "relu";
    return {{v[0], v[1]},
            {v[2], v[3]},
            {v[4], v[5]},
            v[12],
            v[13] == 0 ? none : relu,
            v[14] == 0   ? none
            : v[14] == 1 ? max
                         : avg,
            {v[6], v[7]},
            {v[8], v[9]},
            {v[10], v[11]},
            v[15] != 0};
  }
};

}  // namespace dlfast
