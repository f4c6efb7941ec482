// Batch normalisation, activation and pooling as operators: check, allocate, call the kernels of the backend.
#include "norm/op.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "core/gradients.h"
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

template <typename Acc>
const Acc* pointer(const Tensor& vector) {
  return vector.defined() ? vector.const_data_ptr<Acc>() : nullptr;
}

// The rows of statistics, of numbers of type Acc.
template <typename Acc>
struct Rows {
  Acc* data;
  int64_t channels;
  explicit Rows(const Tensor& statistics)
      : data(statistics.mutable_data_ptr<Acc>()), channels(statistics.size(1)) {}
  Acc* operator[](StatisticsRow row) const { return data + row * channels; }
};

// The same without a type.
struct AnyRows {
  const char* data;
  int64_t bytes;
  explicit AnyRows(const Tensor& statistics)
      : data(static_cast<const char*>(statistics.const_data_ptr())),
        bytes(statistics.size(1) * static_cast<int64_t>(statistics.element_size())) {}
  const void* operator[](StatisticsRow row) const { return data + row * bytes; }
};

// Whether a pass can move `running` itself. What it cannot is moved by PyTorch's operators.
bool moves_along(const OptionalTensor& running, const Tensor& input) {
  return is_given(running) && running->scalar_type() == compute_type(input) && running->is_contiguous() &&
         running->device() == input.device();
}

void move(const OptionalTensor& running, const Tensor& batch, double momentum, double factor) {
  running->mul_(1 - momentum).add_(batch.to(running->scalar_type()), momentum * factor);
}

double count_of(const ReluPoolParams& p) {
  return static_cast<double>(p.batch) * static_cast<double>(p.input_size[0] * p.input_size[1]);
}

void bump_version(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

Normalised normalise(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps,
                     const PoolOptions& options, bool save_winner_mask, const RunningStatistics& running) {
  constexpr const char* op = "batch_norm_relu_pool2d";
  const Dtype dtype = check_dtype(op, "input", input);
  const ReluPoolParams p = check_input(op, input, options);
  TORCH_CHECK(is_given(mean) == is_given(var), op, ": mean and var must be given both or neither");
  const Tensor w = is_given(weight) ? vector_of(op, "weight", *weight, input) : Tensor();
  const Tensor b = is_given(bias) ? vector_of(op, "bias", *bias, input) : Tensor();
  const Tensor m = is_given(mean) ? vector_of(op, "mean", *mean, input) : Tensor();
  const Tensor v = is_given(var) ? vector_of(op, "var", *var, input) : Tensor();
  const c10::OptionalDeviceGuard guard(input.device());
  const NormKernels& kernels = kernels_for(input);
  void* stream = stream_of(input);
  const Tensor z = input.contiguous(format_of(p));
  const Tensor statistics =
      at::empty({kStatisticsRows, p.channels}, input.options().dtype(compute_type(input)));
  const bool fixed = is_given(mean);
  const bool moves_mean = !fixed && moves_along(running.mean, input),
             moves_var = !fixed && moves_along(running.var, input);
  const double unbiased = count_of(p) / (count_of(p) - 1);
  with_compute_type(input, [&](auto zero) {
    using Acc = decltype(zero);
    const Rows<Acc> rows(statistics);
    const TransformVectors<Acc> vectors{
        .channels = p.channels,
        .eps = eps,
        .weight = pointer<Acc>(w),
        .bias = pointer<Acc>(b),
        .fixed_mean = pointer<Acc>(m),
        .fixed_var = pointer<Acc>(v),
        .mean = rows[kMean],
        .var = rows[kVariance],
        .inverse = rows[kInverse],
        .scale = rows[kScale],
        .shift = rows[kShift],
        .running_mean = moves_mean ? running.mean->mutable_data_ptr<Acc>() : nullptr,
        .running_var = moves_var ? running.var->mutable_data_ptr<Acc>() : nullptr,
        .momentum = running.momentum,
        .unbiased = unbiased};
    if (!fixed) {
      const Tensor partial = empty_partials(p, input);
      return kernels.moments(p, dtype, z.const_data_ptr(), partial.data_ptr<double>(), &vectors, stream);
    }
#ifdef DLFAST_WITH_CUDA
    if (input.is_cuda()) return norm_vectors_cuda(vectors, stream);
#endif
    for (int64_t c = 0; c < p.channels; ++c) vectors.run(c);
  });
  if (moves_mean) bump_version(*running.mean);
  if (moves_var) bump_version(*running.var);
  if (!fixed && is_given(running.mean) && !moves_mean) {
    move(running.mean, statistics[kMean], running.momentum, 1);
  }
  if (!fixed && is_given(running.var) && !moves_var) {
    move(running.var, statistics[kVariance], running.momentum, unbiased);
  }
  Tensor output = empty_output(p, input, input.scalar_type());
  Tensor winner_mask = empty_winner_mask(p, input, save_winner_mask && p.pool == Pool::max);
  const AnyRows rows(statistics);
  kernels.forward(p, dtype, z.const_data_ptr(), rows[kScale], rows[kShift], output.data_ptr(),
                  winner_mask_pointer(winner_mask), stream);
  count(input, kForward);
  return {output, winner_mask, statistics};
}

Gradients normalise_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                             const Tensor& statistics, const Tensor& winner_mask, bool batch_statistics,
                             const PoolOptions& options, Mask mask) {
  constexpr const char* op = "batch_norm_relu_pool2d_backward";
  const Dtype dtype = check_dtype(op, "input", input);
  const ReluPoolParams p = check_input(op, input, options);
  check_alike(op, "grad_output", grad_output, "input", input);
  check_sizes(op, "grad_output", grad_output, {p.batch, p.channels, p.output_size[0], p.output_size[1]});
  TORCH_CHECK(statistics.device() == input.device() && statistics.scalar_type() == compute_type(input) &&
                  statistics.is_contiguous(),
              op, ": statistics must be contiguous, of ", compute_type(input), " and on ", input.device(),
              ", got ", statistics.scalar_type(), " on ", statistics.device());
  check_sizes(op, "statistics", statistics, {kStatisticsRows, p.channels});
  const Tensor won = p.pool == Pool::max ? check_winner_mask(op, p, winner_mask, input) : winner_mask;
  const c10::OptionalDeviceGuard guard(input.device());
  const NormKernels& kernels = kernels_for(input);
  void* stream = stream_of(input);
  const Tensor z = input.contiguous(format_of(p)), grad = grad_output.contiguous(format_of(p));

  Tensor grad_z = at::empty(input.sizes(), input.options().memory_format(format_of(p)));
  const Tensor partial = empty_partials(p, input);
  const auto vector_options = statistics.options();
  // Tensors of their own where the caller gets them: sum_g is grad_bias.
  const Tensor sum_g = at::empty({p.channels}, vector_options),
               grad_weight = at::empty({p.channels}, vector_options),
               others = at::empty({3, p.channels}, vector_options);  // sum_gz, by_z, offset
  const AnyRows rows(statistics), other(others);
  const void* by_z = batch_statistics ? other.data + other.bytes : nullptr;
  const void* offset = batch_statistics ? other.data + 2 * other.bytes : nullptr;
  with_compute_type(input, [&](auto zero) {
    using Acc = decltype(zero);
    const Rows<Acc> of(statistics);
    Acc* more = others.mutable_data_ptr<Acc>();
    const GradientVectors<Acc> vectors{.channels = p.channels,
                                       .count = count_of(p),
                                       .inverse = of[kInverse],
                                       .scale = of[kScale],
                                       .sum_g = sum_g.mutable_data_ptr<Acc>(),
                                       .sum_gz = more,
                                       .grad_weight = grad_weight.mutable_data_ptr<Acc>(),
                                       .by_z = batch_statistics ? more + p.channels : nullptr,
                                       .offset = batch_statistics ? more + 2 * p.channels : nullptr};
    kernels.reduce(p, dtype, z.const_data_ptr(), grad.const_data_ptr(), won.const_data_ptr(), of[kScale],
                   of[kShift], of[kMean], partial.data_ptr<double>(), &vectors, grad_z.data_ptr(), stream);
  });

  count(input, kBackward);
  if (mask[0]) {
    kernels.backward(p, dtype, z.const_data_ptr(), grad.const_data_ptr(), won.const_data_ptr(), rows[kScale],
                     rows[kShift], rows[kMean], by_z, offset, grad_z.data_ptr(), stream);
  }
  const auto like_parameter = [&](const Tensor& vector) {
    return is_given(weight) ? vector.to(weight->scalar_type()) : vector;
  };
  return {defined_if(mask[0], grad_z), mask[1] ? like_parameter(grad_weight) : Tensor(),
          mask[2] ? like_parameter(sum_g) : Tensor()};
}

namespace {

Normalised forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& mean, const OptionalTensor& var, double eps,
                   const PoolOptions& options, bool save_winner_mask) {
  return normalise(input, weight, bias, mean, var, eps, options, save_winner_mask, {});
}

Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                   const Tensor& statistics, const Tensor& winner_mask, bool batch_statistics, double /*eps*/,
                   const PoolOptions& options, Mask mask) {
  return filled(normalise_backward(grad_output, input, weight, statistics, winner_mask, batch_statistics,
                                   options, mask),
                input);
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
