// The options of activation and pooling between schemas, autograd and kernels: made, checked and kept here.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "core/schema.h"
#include "pool/params.h"

namespace dlfast {

using OptionalName = std::optional<std::string_view>;

Activation check_activation(const char* op, OptionalName name);
Pool check_pool(const char* op, OptionalName name);
// The pair `value` into `to`; least is what each number must be.
void read_pair(const char* op, const char* name, at::IntArrayRef value, int64_t least, int64_t (&to)[2]);

PoolOptions pool_options(const char* op, OptionalName activation, OptionalName pool, at::IntArrayRef size,
                         at::IntArrayRef stride, at::IntArrayRef padding, bool ceil_mode);

inline OptionalName name_of(Activation activation) {
  return activation == Activation::relu ? OptionalName("relu") : std::nullopt;
}

inline OptionalName name_of(Pool pool) {
  return pool == Pool::none ? std::nullopt : OptionalName(pool == Pool::avg ? "avg" : "max");
}

// The options for tensors of these sizes [N, C, H, W] before pooling.
ReluPoolParams params_of(const char* op, const PoolOptions& options, at::IntArrayRef sizes,
                         bool channels_last);

// The layout of a block's tensors.
inline at::MemoryFormat format_of(const ReluPoolParams& p) {
  return p.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

template <>
struct SchemaArgs<const PoolOptions&> {
  using Types = TypeList<OptionalName, OptionalName, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, bool>;

  static PoolOptions from_schema(const char* op, OptionalName activation, OptionalName pool,
                                 at::IntArrayRef size, at::IntArrayRef stride, at::IntArrayRef padding,
                                 bool ceil_mode) {
    return pool_options(op, activation, pool, size, stride, padding, ceil_mode);
  }
  static auto to_schema(const PoolOptions& o) {
    return std::make_tuple(name_of(o.activation), name_of(o.pool), at::IntArrayRef(o.window.size, 2),
                           at::IntArrayRef(o.window.stride, 2), at::IntArrayRef(o.window.padding, 2),
                           o.ceil_mode);
  }
};

}  // namespace dlfast
