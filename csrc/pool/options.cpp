#include "pool/options.h"

#include <algorithm>
#include <limits>

#include "core/checks.h"

namespace dlfast {

Activation check_activation(const char* op, OptionalName name) {
  if (!name) return Activation::none;
  TORCH_CHECK_VALUE(*name == "relu", op, ": activation must be 'relu' or None, got '", *name, "'");
  return Activation::relu;
}

Pool check_pool(const char* op, OptionalName name) {
  if (!name) return Pool::none;
  TORCH_CHECK_VALUE(*name == "max" || *name == "avg", op, ": pool must be 'max', 'avg' or None, got '", *name,
                    "'");
  return *name == "max" ? Pool::max : Pool::avg;
}

void read_pair(const char* op, const char* name, at::IntArrayRef value, int64_t least, int64_t (&to)[2]) {
  check_pair(op, name, value, least);
  std::copy(value.begin(), value.end(), to);
}

PoolOptions pool_options(const char* op, OptionalName activation, OptionalName pool, at::IntArrayRef size,
                         at::IntArrayRef stride, at::IntArrayRef padding, bool ceil_mode) {
  PoolOptions o{.activation = check_activation(op, activation),
                .pool = check_pool(op, pool),
                .window = {},
                .ceil_mode = ceil_mode};
  read_pair(op, "pool_size", size, 1, o.window.size);
  read_pair(op, "pool_stride", stride, 1, o.window.stride);
  read_pair(op, "pool_padding", padding, 0, o.window.padding);
  TORCH_CHECK(size[0] * size[1] <= std::numeric_limits<int32_t>::max(), op,
              ": pool_size must have less than 2**31 positions, got ", size);
  TORCH_CHECK(o.pool == Pool::none || (2 * padding[0] <= size[0] && 2 * padding[1] <= size[1]), op,
              ": pool_padding must be at most half of pool_size, got ", padding, " for pool_size ", size);
  return o;
}

namespace {

// Output size of a pooling along one axis, as PyTorch has it: with ceil_mode the last window must start
// inside the input or its leading padding.
int64_t pooled_size(int64_t input, int64_t size, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t span = input + 2 * padding - size + (ceil_mode ? stride - 1 : 0);
  if (span < 0) return 0;
  int64_t output = span / stride + 1;
  if (ceil_mode && (output - 1) * stride >= input + padding) --output;
  return output;
}

}  // namespace

ReluPoolParams params_of(const char* op, const PoolOptions& options, at::IntArrayRef sizes,
                         bool channels_last) {
  ReluPoolParams p{};
  static_cast<PoolOptions&>(p) = options;
  p.batch = sizes[0];
  p.channels = sizes[1];
  p.channels_last = channels_last;
  for (const int axis : {0, 1}) {
    PoolWindow& w = p.window;
    if (p.pool == Pool::none) {
      w.size[axis] = w.stride[axis] = 1;
      w.padding[axis] = 0;
    }
    p.input_size[axis] = sizes[2 + axis];
    p.output_size[axis] = p.pool == Pool::none ? p.input_size[axis]
                                               : pooled_size(p.input_size[axis], w.size[axis], w.stride[axis],
                                                             w.padding[axis], p.ceil_mode);
  }
  TORCH_CHECK(p.output_size[0] > 0 && p.output_size[1] > 0, op, ": pool_size ",
              at::IntArrayRef(options.window.size, 2), " is larger than the padded convolution output of ",
              p.input_size[0], "x", p.input_size[1]);
  return p;
}

}  // namespace dlfast
