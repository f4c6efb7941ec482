// Every operator schema of dlfast on one page.
// Backends register their own kernels beside the operators (TORCH_LIBRARY_IMPL in the op.cpp files).
#include <torch/library.h>

TORCH_LIBRARY(dlfast, m) {
  // The public operator. It is a composite of the differentiable one below it.
  m.def(
      "conv_relu_pool2d(Tensor input, Tensor weight, Tensor? bias=None, *, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, int groups=1, str? activation='relu', "
      "str? pool='max', int[2] pool_size=2, int[2]? pool_stride=None, int[2] pool_padding=0, "
      "bool ceil_mode=False) -> Tensor");

  // Batched input only. `winner_mask` is what backward needs to know of the windows (see pool/params.h); it
  // is empty where nothing is needed or save_winner_mask is false. `algorithms` are those of forward,
  // grad_input and grad_weight (see conv/algorithm.h), -1 where they are to be chosen.
  m.def(
      "_conv_relu_pool2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, str? activation, str? pool, int[2] pool_size, "
      "int[2] pool_stride, int[2] pool_padding, bool ceil_mode, bool save_winner_mask, "
      "int[3] algorithms=[-1, -1, -1]) -> (Tensor output, Tensor winner_mask)");
  // Where output_mask is false the result is an empty tensor.
  m.def(
      "_conv_relu_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor winner_mask, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, str? activation, str? pool, "
      "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode, "
      "bool[3] output_mask, int[3] algorithms=[-1, -1, -1]) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // The pass after a convolution: bias, activation and pooling of its output.
  m.def(
      "_relu_pool2d(Tensor input, Tensor? bias, str? activation, str? pool, int[2] pool_size, "
      "int[2] pool_stride, int[2] pool_padding, bool ceil_mode, bool save_winner_mask) "
      "-> (Tensor output, Tensor winner_mask)");
  // The linear map from the gradient of the pooled output to that of the convolution output, and its
  // transpose; each is the other's derivative.
  m.def(
      "_relu_pool2d_backward(Tensor grad_output, Tensor winner_mask, SymInt[2] input_size, str? activation, "
      "str? pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode) "
      "-> Tensor");
  m.def(
      "_relu_pool2d_transpose(Tensor grad_input, Tensor winner_mask, str? activation, str? pool, "
      "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode) -> Tensor");

  // ---- Batch normalisation, activation and pooling ----------------------------------------------------
  // mean and var [C] are given where they are fixed; else they are the batch's, var the biased one.
  // statistics [5, C] are mean, var, 1 / deviation, scale and shift (see norm/op.h). winner_mask is that of
  // _conv_relu_pool2d for max pooling and else empty.
  m.def(
      "_batch_norm_relu_pool2d(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
      "float eps, str? activation, str? pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, "
      "bool ceil_mode, bool save_winner_mask) -> (Tensor output, Tensor winner_mask, Tensor statistics)");
  // Where output_mask is false the result is an empty tensor.
  m.def(
      "_batch_norm_relu_pool2d_backward(Tensor grad_output, Tensor input, Tensor? weight, "
      "Tensor statistics, Tensor winner_mask, bool batch_statistics, float eps, str? activation, str? pool, "
      "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode, bool[3] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}
