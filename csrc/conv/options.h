// The options of a convolution block between schemas, autograd and kernels: made, checked and kept here.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "conv/algorithm.h"
#include "conv/params.h"
#include "core/schema.h"
#include "pool/options.h"

namespace dlfast {

ConvOptions conv_options(const char* op, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, int64_t groups);

// The options for these tensors. Checks shapes only; dtypes and devices are check_alike's.
ConvBlockParams params_of(const char* op, const BlockOptions& options, const at::Tensor& input,
                          const at::Tensor& weight);

template <>
struct SchemaArgs<const BlockOptions&> {
  using Types = Concat<TypeList<at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t>,
                       SchemaArgs<const PoolOptions&>::Types>::Type;

  template <typename... Pooling>
  static BlockOptions from_schema(const char* op, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, int64_t groups, const Pooling&... pooling) {
    return {conv_options(op, stride, padding, dilation, groups),
            SchemaArgs<const PoolOptions&>::from_schema(op, pooling...)};
  }
  static auto to_schema(const BlockOptions& o) {
    return std::tuple_cat(
        std::make_tuple(at::IntArrayRef(o.conv.stride, 2), at::IntArrayRef(o.conv.padding, 2),
                        at::IntArrayRef(o.conv.dilation, 2), o.conv.groups),
        SchemaArgs<const PoolOptions&>::to_schema(o.pool));
  }
};

template <>
struct SchemaArgs<const ChosenAlgorithms&> {
  using Types = TypeList<at::IntArrayRef>;
  static ChosenAlgorithms from_schema(const char* op, at::IntArrayRef algorithms);
  static auto to_schema(const ChosenAlgorithms& a) { return std::make_tuple(at::IntArrayRef(a.of, 3)); }
};

// The options as the public operator has them: there pool_stride may be None, which means pool_size.
struct PublicOptions : BlockOptions {};

template <>
struct SchemaArgs<const PublicOptions&> {
  using Types = TypeList<at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, OptionalName,
                         OptionalName, at::IntArrayRef, at::OptionalIntArrayRef, at::IntArrayRef, bool>;

  static PublicOptions from_schema(const char* op, at::IntArrayRef stride, at::IntArrayRef padding,
                                   at::IntArrayRef dilation, int64_t groups, OptionalName activation,
                                   OptionalName pool, at::IntArrayRef pool_size,
                                   at::OptionalIntArrayRef pool_stride, at::IntArrayRef pool_padding,
                                   bool ceil_mode) {
    return {{conv_options(op, stride, padding, dilation, groups),
             pool_options(op, activation, pool, pool_size, pool_stride ? *pool_stride : pool_size,
                          pool_padding, ceil_mode)}};
  }
  static auto to_schema(const PublicOptions& o) { return SchemaArgs<const BlockOptions&>::to_schema(o); }
};

}  // namespace dlfast
