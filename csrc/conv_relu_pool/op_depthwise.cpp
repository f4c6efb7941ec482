#include "conv_relu_pool/op_depthwise.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

namespace dlfast {
namespace {

using at::Tensor;

WeightSteps steps_of(const Tensor& weight) {
  return {.out = weight.stride(0),
          .in = weight.stride(1),
          .kernel = {weight.stride(2), weight.stride(3)},
          .group = weight.stride(0)};
}

Tensor floats(const Tensor& like, int64_t count) {
  return at::empty({count}, like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
}

}  // namespace

void depthwise_forward(const ConvBlockParams& p, Dtype dtype, const Tensor& input, const Tensor& weight,
                       const std::optional<Tensor>& bias, Tensor& output) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = at::get_num_threads();
  const Tensor b = bias && bias->defined() ? bias->contiguous() : Tensor();
  const Tensor scratch = floats(input, kernels.depthwise_scratch(p, dtype, false, threads));
  kernels.depthwise_forward(p, steps_of(weight), dtype, input.const_data_ptr(), weight.const_data_ptr(),
                            b.defined() ? b.const_data_ptr() : nullptr, output.data_ptr(),
                            scratch.data_ptr<float>(), threads);
}

void depthwise_grad_input(const ConvBlockParams& p, Dtype dtype, const Tensor& grad_z, const Tensor& weight,
                          Tensor& grad_input) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = at::get_num_threads();
  const Tensor scratch = floats(grad_z, kernels.depthwise_scratch(p, dtype, true, threads));
  kernels.depthwise_grad_input(p, steps_of(weight), dtype, weight.const_data_ptr(), grad_z.const_data_ptr(),
                               grad_input.data_ptr(), scratch.data_ptr<float>(), threads);
}

void depthwise_grad_weight(const ConvBlockParams& p, Dtype dtype, const Tensor& grad_z, const Tensor& input,
                           Tensor& grad_weight, const Tensor& grad_bias) {
  const CpuKernels& kernels = cpu_kernels();
  const Tensor scratch = floats(input, kernels.depthwise_grad_weight_scratch(p, dtype));
  kernels.depthwise_grad_weight(p, dtype, input.const_data_ptr(), grad_z.const_data_ptr(),
                                grad_weight.data_ptr(), grad_bias.defined() ? grad_bias.data_ptr() : nullptr,
                                scratch.data_ptr<float>());
}

}  // namespace dlfast
