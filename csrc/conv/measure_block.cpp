#include "conv/measure_block.h"

#ifdef DLFAST_WITH_CUDA
#include <ATen/Context.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd.h>

#include "conv/eager.h"
#include "conv/heuristics.h"
#include "conv/measure_cuda.h"

namespace dlfast {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

// No key of a part begins like this: those begin with a dtype.
constexpr int64_t kBlockKey = -1;

MemoKey key_of(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
               const BlockOptions& options, bool backward) {
  MemoKey key{kBlockKey,
              static_cast<int64_t>(input.scalar_type()),
              options.conv.groups,
              static_cast<int64_t>(options.pool.activation),
              static_cast<int64_t>(options.pool.pool),
              options.pool.ceil_mode,
              backward,
              input.requires_grad(),
              weight.requires_grad(),
              is_given(bias),
              at::globalContext().allowTF32CuDNN(at::Float32Op::CONV),
              at::globalContext().deterministicAlgorithms()};
  for (const at::IntArrayRef sizes : {input.sizes(), input.strides(), weight.sizes(), weight.strides()}) {
    key.add_list(sizes);
  }
  const PoolWindow& window = options.pool.window;
  for (const int64_t* pair : {options.conv.stride, options.conv.padding, options.conv.dilation, window.size,
                              window.stride, window.padding}) {
    key.add({pair[0], pair[1]});
  }
  return key;
}

}  // namespace

std::optional<BlockSeconds> measured_block(const Tensor& input, const Tensor& weight,
                                           const OptionalTensor& bias, const BlockOptions& options,
                                           bool backward) {
  if (!goes_by_measurements(input) || is_forced_on_cuda()) return std::nullopt;
  const auto seconds = remembered(input.device().index(), key_of(input, weight, bias, options, backward));
  if (!seconds) return std::nullopt;
  return BlockSeconds{.ours = seconds->at(0), .eager = seconds->at(1)};
}

bool eager_is_faster(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                     const BlockOptions& options, bool backward, const BlockFunction& ours) {
  // Checkpointing runs a block twice, and must find the same tensors saved.
  if (!goes_by_measurements(input) || is_forced_on_cuda() || is_watched()) return false;
  if (const auto known = measured_block(input, weight, bias, options, backward))
    return known->eager < known->ours;
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
      const Tensor output = block(x, w, is_given(bias) ? OptionalTensor(leaf(*bias)) : bias);
      if (backward) torch::autograd::grad({output}, leaves, {at::ones_like(output)});
    });
  };
  const BlockSeconds found{.ours = seconds(ours),
                           .eager = seconds([&](const Tensor& x, const Tensor& w, const OptionalTensor& b) {
                             return eager_block(x, w, b, options);
                           })};
  remember(input.device().index(), key_of(input, weight, bias, options, backward), {found.ours, found.eager});
  return found.eager < found.ours;
}

}  // namespace dlfast
#endif
