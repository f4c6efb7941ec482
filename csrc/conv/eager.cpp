#include "conv/eager.h"

#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/relu.h>

namespace dlfast {

at::Tensor eager_block(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                       const BlockOptions& options) {
  const ConvOptions& c = options.conv;
  const PoolOptions& o = options.pool;
  const PoolWindow& w = o.window;
  at::Tensor x = at::conv2d(input, weight, bias, c.stride, c.padding, c.dilation, c.groups);
  if (o.activation == Activation::relu) x = at::relu(x);
  switch (o.pool) {
    case Pool::none:
      return x;
    case Pool::max:
      return at::max_pool2d(x, w.size, w.stride, w.padding, 1, o.ceil_mode);
    case Pool::avg:
      break;
  }
  return at::avg_pool2d(x, w.size, w.stride, w.padding, o.ceil_mode);
}

}  // namespace dlfast
