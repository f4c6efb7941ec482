// The pass after a convolution on tensors, as the whole block uses it. Arguments have been checked unless
// said.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "conv_relu_pool/relu_pool.h"

namespace dlfast {

const ReluPoolBackend& backend_of(const at::Tensor& tensor);
void* stream_of(const at::Tensor& tensor);  // the current one; null on the CPU

at::Tensor nothing(const at::Tensor& like);  // no element
at::Tensor empty_output(const ReluPoolParams& p, const at::Tensor& like, at::ScalarType dtype);

// The code backward needs, uninitialised; an empty tensor where it needs none (see params.h).
at::Tensor empty_code(const ReluPoolParams& p, const at::Tensor& like, bool save_code);
void* code_pointer(const at::Tensor& code);

// `code` is what forward gave for this problem, in the layout of y. Checks it.
at::Tensor check_code(const char* op, const ReluPoolParams& p, const at::Tensor& code,
                      const at::Tensor& like);

// The operator _relu_pool2d; checks its arguments.
std::tuple<at::Tensor, at::Tensor> relu_pool2d(const at::Tensor& input, const std::optional<at::Tensor>& bias,
                                               std::optional<std::string_view> activation,
                                               std::optional<std::string_view> pool,
                                               at::IntArrayRef pool_size, at::IntArrayRef pool_stride,
                                               at::IntArrayRef pool_padding, bool ceil_mode, bool save_code);

// The gradient of the convolution output, in the layout of p.
at::Tensor expand_gradient(const ReluPoolParams& p, Dtype dtype, const at::Tensor& grad_output,
                           const at::Tensor& code);

}  // namespace dlfast
