// Derivatives as nodes of PyTorch's graph. What a node keeps are plain members: a torch::autograd::Function
// keeps them in a map of names, which costs more than some of the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include "core/checks.h"
#include "core/gradients.h"

namespace dlfast {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePointer = decltype(torch::autograd::Edge::function);

inline bool asks_gradient(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}
inline bool asks_gradient(const std::optional<at::Tensor>& tensor) {
  return tensor && asks_gradient(*tensor);
}

// Whether an operator on these has to be recorded.
template <typename... Tensors>
bool records(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (asks_gradient(tensors) || ...);
}

// A node between `inputs` and what it will be the history of. PyTorch counts references to nodes in one of
// two ways, by its version.
template <typename N, typename Pointer = NodePointer, typename... Inputs>
auto make_node(const Inputs&... inputs) {
  const auto linked = [&](auto node) {
    node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
    return node;
  };
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return linked(std::shared_ptr<N>(new N, [](N* node) { deleteNode(node); }));
  } else {
    return linked(c10::make_intrusive<N>());
  }
}

// Makes `output` what `node` is the history of.
inline void set_history(const at::Tensor& output, const NodePointer& node) {
  const uint32_t number = node->add_input_metadata(output);
  torch::autograd::impl::set_gradient_edge(output, {node, number});
}

// To be called once, when a node has all that it keeps.
template <typename Pointer>
void completed(const Pointer& node) {
  if constexpr (!std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {
    fire_node_creation_hooks(node);
  }
}

// What a saved tensor may be: nothing at all.
inline SavedVariable saved(const std::optional<at::Tensor>& tensor, bool is_output = false) {
  return SavedVariable(tensor ? *tensor : at::Tensor(), is_output);
}
inline std::optional<at::Tensor> unpacked(const SavedVariable& variable) {
  at::Tensor tensor = variable.unpack();
  return tensor.defined() ? std::optional<at::Tensor>(std::move(tensor)) : std::nullopt;
}

// `grads` of the tensors that `mask` asks for; the others are undefined.
inline variable_list gradient_list(const Mask& mask, const Gradients& grads) {
  return {defined_if(mask[0], std::get<0>(grads)), defined_if(mask[1], std::get<1>(grads)),
          defined_if(mask[2], std::get<2>(grads))};
}

// A forward without it kept nothing for a backward.
inline void check_saved(const char* op, bool saved_winner_mask) {
  TORCH_CHECK(saved_winner_mask, op,
              ": backward needs the winner mask, but the forward ran with save_winner_mask=False");
}

}  // namespace dlfast
