// The pass of activation and pooling on tensors, for whoever has something before it: a convolution, a
// normalisation. Arguments have been checked unless said.
//
// `winner_mask` is the winner mask of pool/params.h. That of an average has shape [bytes], or [bytes, 1]
// where z is channels_last: its bits are in the memory order of z.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "core/checks.h"
#include "pool/kernels.h"
#include "pool/options.h"

namespace dlfast {

const PoolKernels& pool_kernels(const at::Tensor& tensor);  // of its device
void* stream_of(const at::Tensor& tensor);                  // the current one; null on the CPU

at::Tensor nothing(const at::Tensor& like);  // no element
at::Tensor empty_output(const ReluPoolParams& p, const at::Tensor& like, at::ScalarType dtype);

// What backward needs, uninitialised; an empty tensor where it needs none.
at::Tensor empty_winner_mask(const ReluPoolParams& p, const at::Tensor& like, bool save_winner_mask);
void* winner_mask_pointer(const at::Tensor& winner_mask);

// `winner_mask` is what forward gave for this problem, in the layout of y. Checks it.
at::Tensor check_winner_mask(const char* op, const ReluPoolParams& p, const at::Tensor& winner_mask,
                             const at::Tensor& like);

// The operator _relu_pool2d with its result in the layout that is asked for, since strides do not tell it
// where a dimension has one element. Checks its arguments.
std::tuple<at::Tensor, at::Tensor> relu_pool2d_in(bool channels_last, const at::Tensor& input,
                                                  const OptionalTensor& bias, const PoolOptions& options,
                                                  bool save_winner_mask);

// The gradient of what was pooled, in the layout of p.
at::Tensor expand_gradient(const ReluPoolParams& p, Dtype dtype, const at::Tensor& grad_output,
                           const at::Tensor& winner_mask);

}  // namespace dlfast
