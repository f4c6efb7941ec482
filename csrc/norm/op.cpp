// Batch normalisation, activation and pooling as operators: check, allocate, call the kernels of the backend.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "core/autograd.h"
#include "core/ran.h"
#include "norm/cpu/slices.h"
#include "norm/kernels.h"
#include "pool/op.h"

namespace dlfast {
namespace {

using at::Tensor;

enum Part { kForward, kBackward };

void count(const Tensor& tensor, Part part) {
  static RanTable table("batch_norm_relu_pool2d", {"forward", "backward"}, {"pass"});
  table.add(tensor.is_cuda(), part, 0);
}

const NormKernels& kernels_for([[maybe_unused]] const Tensor& tensor) {
#ifdef DLFAST_WITH_CUDA
  if (tensor.is_cuda()) return norm_cuda();
#endif
  return norm_cpu();
}

// Workspace of the sums per channel.
Tensor empty_partials(const ReluPoolParams& p, const Tensor& like) {
  int64_t numbers = norm_partials(p);
#ifdef DLFAST_WITH_CUDA
  if (like.is_cuda()) numbers = norm_partials_cuda(p);
#endif
  return at::empty({numbers}, like.options().dtype(at::kDouble));
}

// What vectors [C] are computed in: float, or double for float64.
at::ScalarType compute_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor vector_of(const char* op, const char* name, const Tensor& vector, const Tensor& input) {
  TORCH_CHECK(vector.device() == input.device(), op, ": ", name, " must be on the device of input (",
              input.device(), "), got ", vector.device());
  TORCH_CHECK(vector.dim() == 1 && vector.size(0) == input.size(1), op, ": ", name, " must have shape [",
              input.size(1), "], one number per channel, got ", vector.sizes());
  return vector.to(compute_type(input)).contiguous();
}

ReluPoolParams check_input(const char* op, const Tensor& input, const PoolOptions& options) {
  TORCH_CHECK(input.dim() == 4, op, ": input must have shape [N, C, H, W], got ", input.sizes());
  check_alike(op, "input", input, "input", input);
  TORCH_CHECK(input.numel() > 0, op, ": input must not be empty, got ", input.sizes());
  return params_of(op, options, input.sizes(),
                   input.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
}

// Calls visit(Acc{}) for what the vectors of `input` are computed in.
template <typename Visit>
auto with_compute_type(const Tensor& input, Visit visit) {
  return compute_type(input) == at::kDouble ? visit(double{}) : visit(float{});
}

template <typename Vectors>
void compute(const Vectors& vectors, [[maybe_unused]] const Tensor& input) {
#ifdef DLFAST_WITH_CUDA
  if (input.is_cuda()) return norm_vectors_cuda(vectors, stream_of(input));
#endif
  for (int64_t c = 0; c < vectors.channels; ++c) vectors.run(c);
}

template <typename Acc>
const Acc* pointer(const Tensor& vector) {
  return vector.defined() ? vector.const_data_ptr<Acc>() : nullptr;
}

struct Transform {
  Tensor inverse, scale, shift;
};

Transform transform_of(const char* op, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps) {
  const Tensor w = is_given(weight) ? vector_of(op, "weight", *weight, input) : Tensor();
  const Tensor b = is_given(bias) ? vector_of(op, "bias", *bias, input) : Tensor();
  Transform t{at::empty_like(mean), at::empty_like(mean), at::empty_like(mean)};
  with_compute_type(input, [&](auto zero) {
    using Acc = decltype(zero);
    compute(TransformVectors<Acc>{.channels = input.size(1),
                                  .eps = eps,
                                  .weight = pointer<Acc>(w),
                                  .bias = pointer<Acc>(b),
                                  .mean = pointer<Acc>(mean),
                                  .var = pointer<Acc>(var),
                                  .inverse = t.inverse.data_ptr<Acc>(),
                                  .scale = t.scale.data_ptr<Acc>(),
                                  .shift = t.shift.data_ptr<Acc>()},
            input);
  });
  return t;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& mean,
                                                   const OptionalTensor& var, double eps,
                                                   const PoolOptions& options, bool save_winner_mask) {
  constexpr const char* op = "batch_norm_relu_pool2d";
  const Dtype dtype = check_dtype(op, "input", input);
  const ReluPoolParams p = check_input(op, input, options);
  TORCH_CHECK(is_given(mean) == is_given(var), op, ": mean and var must be given both or neither");
  const c10::OptionalDeviceGuard guard(input.device());
  const NormKernels& kernels = kernels_for(input);
  void* stream = stream_of(input);
  const Tensor z = input.contiguous(format_of(p));
  const auto vectors = input.options().dtype(compute_type(input));
  Tensor batch_mean = at::empty({is_given(mean) ? 0 : p.channels}, vectors);
  Tensor batch_var = at::empty_like(batch_mean);
  Tensor m, v;
  if (is_given(mean)) {
    m = vector_of(op, "mean", *mean, input);
    v = vector_of(op, "var", *var, input);
  } else {
    const Tensor partial = empty_partials(p, input);
    kernels.moments(p, dtype, z.const_data_ptr(), partial.data_ptr<double>(), batch_mean.data_ptr(),
                    batch_var.data_ptr(), stream);
    m = batch_mean;
    v = batch_var;
  }
  const Transform transform = transform_of(op, input, weight, bias, m, v, eps);
  Tensor output = empty_output(p, input, input.scalar_type());
  Tensor winner_mask = empty_winner_mask(p, input, save_winner_mask && p.pool == Pool::max);
  kernels.forward(p, dtype, z.const_data_ptr(), transform.scale.const_data_ptr(),
                  transform.shift.const_data_ptr(), output.data_ptr(), winner_mask_pointer(winner_mask),
                  stream);
  count(input, kForward);
  return {output, winner_mask, batch_mean, batch_var};
}

Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                   const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                   const Tensor& winner_mask, bool batch_statistics, double eps, const PoolOptions& options,
                   Mask output_mask) {
  constexpr const char* op = "batch_norm_relu_pool2d_backward";
  const Dtype dtype = check_dtype(op, "input", input);
  const ReluPoolParams p = check_input(op, input, options);
  const std::array<int64_t, 4> sizes = {p.batch, p.channels, p.output_size[0], p.output_size[1]};
  check_alike(op, "grad_output", grad_output, "input", input);
  check_sizes(op, "grad_output", grad_output, sizes);
  const Tensor c = p.pool == Pool::max ? check_winner_mask(op, p, winner_mask, input) : winner_mask;
  const c10::OptionalDeviceGuard guard(input.device());
  const Tensor m = vector_of(op, "mean", mean, input), v = vector_of(op, "var", var, input);
  const Transform transform = transform_of(op, input, weight, bias, m, v, eps);
  const NormKernels& kernels = kernels_for(input);
  void* stream = stream_of(input);
  const Tensor z = input.contiguous(format_of(p)), grad = grad_output.contiguous(format_of(p));

  Tensor grad_z = at::empty(input.sizes(), input.options().memory_format(format_of(p)));
  const Tensor partial = empty_partials(p, input);
  const Tensor sum_g = at::empty_like(m), sum_gz = at::empty_like(m);
  kernels.reduce(p, dtype, z.const_data_ptr(), grad.const_data_ptr(), c.const_data_ptr(),
                 transform.scale.const_data_ptr(), transform.shift.const_data_ptr(), m.const_data_ptr(),
                 partial.data_ptr<double>(), sum_g.data_ptr(), sum_gz.data_ptr(), grad_z.data_ptr(), stream);

  const Tensor weight_sum = at::empty_like(m);
  const Tensor by_z = batch_statistics ? at::empty_like(m) : Tensor(),
               offset = batch_statistics ? at::empty_like(m) : Tensor();
  with_compute_type(input, [&](auto zero) {
    using Acc = decltype(zero);
    compute(GradientVectors<Acc>{.channels = p.channels,
                                 .count = static_cast<double>(p.batch * p.input_size[0] * p.input_size[1]),
                                 .inverse = pointer<Acc>(transform.inverse),
                                 .scale = pointer<Acc>(transform.scale),
                                 .sum_g = pointer<Acc>(sum_g),
                                 .sum_gz = pointer<Acc>(sum_gz),
                                 .grad_weight = weight_sum.data_ptr<Acc>(),
                                 .by_z = batch_statistics ? by_z.data_ptr<Acc>() : nullptr,
                                 .offset = batch_statistics ? offset.data_ptr<Acc>() : nullptr},
            input);
  });

  count(input, kBackward);
  const auto [needs_input, needs_weight, needs_bias] = output_mask;
  const auto like_parameter = [&](const OptionalTensor& parameter, const Tensor& grad) {
    return is_given(parameter) ? grad.to(parameter->scalar_type()) : grad;
  };
  const Tensor nothing = at::empty({0}, input.options());
  const Tensor grad_weight = needs_weight ? like_parameter(weight, weight_sum) : nothing;
  const Tensor grad_bias = needs_bias ? like_parameter(bias, sum_g) : nothing.clone();
  if (!needs_input) return {nothing.clone(), grad_weight, grad_bias};
  kernels.backward(p, dtype, z.const_data_ptr(), grad.const_data_ptr(), c.const_data_ptr(),
                   transform.scale.const_data_ptr(), transform.shift.const_data_ptr(), m.const_data_ptr(),
                   batch_statistics ? by_z.const_data_ptr() : nullptr,
                   batch_statistics ? offset.const_data_ptr() : nullptr, grad_z.data_ptr(), stream);
  return {grad_z, grad_weight, grad_bias};
}

void register_all(torch::Library& m) {
  m.impl("_batch_norm_relu_pool2d", kernel_of<"batch_norm_relu_pool2d", forward>);
  m.impl("_batch_norm_relu_pool2d_backward", kernel_of<"batch_norm_relu_pool2d_backward", backward>);
}

}  // namespace

TORCH_LIBRARY_IMPL(dlfast, CPU, m) {
  register_all(m);
}

#ifdef DLFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(dlfast, CUDA, m) {
  register_all(m);
}
#endif

}  // namespace dlfast
