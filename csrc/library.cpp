// Every operator schema of dlfast on one page, and the Python module that carries build facts.
// Backends register their own kernels next to their code (TORCH_LIBRARY_IMPL in the op.cpp files).
#include <torch/extension.h>
#include <torch/library.h>

#include "common/simd.h"
#include "optim/op_plan.h"

TORCH_LIBRARY(dlfast, m) {
  // The public operator. It is a composite of the differentiable one below it.
  m.def(
      "conv_relu_pool2d(Tensor input, Tensor weight, Tensor? bias=None, *, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, int groups=1, str? activation='relu', "
      "str? pool='max', int[2] pool_size=2, int[2]? pool_stride=None, int[2] pool_padding=0, "
      "bool ceil_mode=False) -> Tensor");

  // Batched input only. `code` is what backward needs to know of the windows (see params.h); it is
  // empty where nothing is needed or save_code is false.
  m.def(
      "_conv_relu_pool2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, str? activation, str? pool, int[2] pool_size, "
      "int[2] pool_stride, int[2] pool_padding, bool ceil_mode, bool save_code) "
      "-> (Tensor output, Tensor code)");
  // Where output_mask is false the result is an empty tensor.
  m.def(
      "_conv_relu_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor code, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, str? activation, str? pool, "
      "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // The pass after a convolution: bias, activation and pooling of its output.
  m.def(
      "_relu_pool2d(Tensor input, Tensor? bias, str? activation, str? pool, int[2] pool_size, "
      "int[2] pool_stride, int[2] pool_padding, bool ceil_mode, bool save_code) "
      "-> (Tensor output, Tensor code)");
  // The linear map from the gradient of the pooled output to that of the convolution output, and its
  // transpose; each is the other's derivative.
  m.def(
      "_relu_pool2d_backward(Tensor grad_output, Tensor code, SymInt[2] input_size, str? activation, "
      "str? pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode) "
      "-> Tensor");
  m.def(
      "_relu_pool2d_transpose(Tensor grad_input, Tensor code, str? activation, str? pool, "
      "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode) -> Tensor");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of dlfast; call them through torch.ops.dlfast";
  m.def(
      "simd_level", [] { return std::string(dlfast::simd_name(dlfast::simd_level())); },
      "SIMD level of the CPU kernels in use: 'avx512', 'avx2' or 'default'");
  dlfast::optim::bind_plan(m);
}
