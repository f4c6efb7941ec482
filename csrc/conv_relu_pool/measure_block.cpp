#include "conv_relu_pool/measure_block.h"

#ifdef DLFAST_WITH_CUDA
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd.h>

#include "conv_relu_pool/measure_cuda.h"
#include "conv_relu_pool/plan.h"

namespace dlfast {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

bool defined(const OptionalTensor& tensor) {
  return tensor && tensor->defined();
}

// No key of a part begins like this: those begin with a dtype.
constexpr int64_t kBlockKey = -1;

MemoKey key_of(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Geometry& g,
               bool backward) {
  MemoKey key{kBlockKey,
              input.device().index(),
              static_cast<int64_t>(input.scalar_type()),
              g.groups,
              g.activation.has_value(),
              g.pool ? (*g.pool == "avg" ? 2 : 1) : 0,
              g.ceil_mode,
              backward,
              input.requires_grad(),
              weight.requires_grad(),
              defined(bias),
              at::globalContext().allowTF32CuDNN(at::Float32Op::CONV),
              at::globalContext().deterministicAlgorithms()};
  for (const at::IntArrayRef sizes : {input.sizes(), input.strides(), weight.sizes(), weight.strides()}) {
    key.add_list(sizes);
  }
  for (const Geometry::Pair& pair :
       {g.stride, g.padding, g.dilation, g.pool_size, g.pool_stride, g.pool_padding}) {
    key.add({pair[0], pair[1]});
  }
  return key;
}

}  // namespace

Tensor eager_block(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Geometry& g) {
  Tensor x = at::conv2d(input, weight, bias, g.stride, g.padding, g.dilation, g.groups);
  if (g.activation) x = at::relu(x);
  if (!g.pool) return x;
  return *g.pool == "avg" ? at::avg_pool2d(x, g.pool_size, g.pool_stride, g.pool_padding, g.ceil_mode)
                          : at::max_pool2d(x, g.pool_size, g.pool_stride, g.pool_padding, 1, g.ceil_mode);
}

std::optional<BlockSeconds> measured_block(const Tensor& input, const Tensor& weight,
                                           const OptionalTensor& bias, const Geometry& g, bool backward) {
  if (!goes_by_measurements(input) || cuda_plan_is_forced()) return std::nullopt;
  const auto seconds = remembered(key_of(input, weight, bias, g, backward));
  if (!seconds) return std::nullopt;
  return BlockSeconds{.ours = seconds->at(0), .eager = seconds->at(1)};
}

bool eager_is_faster(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Geometry& g,
                     bool backward, const BlockFunction& ours) {
  // Checkpointing runs a block twice, and must find the same tensors saved.
  if (!goes_by_measurements(input) || cuda_plan_is_forced() || is_watched()) return false;
  if (const auto known = measured_block(input, weight, bias, g, backward)) return known->eager < known->ours;
  // The operator above dispatch has no guard yet, and events are those of the current device.
  const c10::OptionalDeviceGuard guard(input.device());
  if (!may_measure(input)) return false;
  const auto seconds = [&](const BlockFunction& block) {
    return seconds_of([&] {
      variable_list leaves;
      const auto leaf = [&](const Tensor& t) {
        Tensor copy = t.detach();
        if (backward && t.requires_grad()) leaves.push_back(copy.requires_grad_());
        return copy;
      };
      const Tensor x = leaf(input), w = leaf(weight);
      const Tensor output = block(x, w, defined(bias) ? OptionalTensor(leaf(*bias)) : bias);
      if (backward) torch::autograd::grad({output}, leaves, {at::ones_like(output)});
    });
  };
  const BlockSeconds found{.ours = seconds(ours),
                           .eager = seconds([&](const Tensor& x, const Tensor& w, const OptionalTensor& b) {
                             return eager_block(x, w, b, g);
                           })};
  remember(key_of(input, weight, bias, g, backward), {found.ours, found.eager});
  return found.eager < found.ours;
}

}  // namespace dlfast
#endif
