// The operators of the pass as autograd calls them, with symbolic sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/node.h"
#include "pool/options.h"

namespace dlfast {

// The gradient of what was pooled from that of the pooled; differentiable again.
at::Tensor call_expand(const at::Tensor& grad, const at::Tensor& winner_mask, c10::SymIntArrayRef input_size,
                       const PoolOptions& options);

// What a node keeps as the winner mask: without pooling ReLU's own output tells where gradient passes.
// `output` has its history already.
inline SavedVariable saved_winner_mask(const PoolOptions& o, const at::Tensor& output,
                                       const at::Tensor& winner_mask) {
  const bool is_output = o.pool == Pool::none && o.activation != Activation::none;
  return is_output ? saved(output, /*is_output=*/true) : saved(winner_mask);
}

}  // namespace dlfast
