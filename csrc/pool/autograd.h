// The operators of the pass as autograd calls them, with symbolic sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include "pool/options.h"

namespace dlfast {

// The gradient of what was pooled from that of the pooled; differentiable again.
at::Tensor call_expand(const at::Tensor& grad, const at::Tensor& winner_mask, c10::SymIntArrayRef input_size,
                       const PoolOptions& options);

// What backward is given as the winner mask: without pooling ReLU's own output tells where gradient passes.
inline const at::Tensor& winner_mask_of(const PoolOptions& o, const at::Tensor& output,
                                        const at::Tensor& winner_mask) {
  return o.pool == Pool::none && o.activation != Activation::none ? output : winner_mask;
}

}  // namespace dlfast
