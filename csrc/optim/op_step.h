// A prepared step: tensors that were checked once, with their pointers, for the steps that follow.
//
// Preparing takes a look at every tensor and costs far more than a step of a small network. A PreparedStep
// keeps what it found and asks at each step only whether it still holds: the same parameters, states and
// memory. Where it does not, run() says so before anything has changed, and the optimizer prepares anew.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "optim/cpu/step.h"
#include "optim/held_tensor.h"
#include "optim/params.h"

namespace dlfast::optim {

// One parameter of a step and what belongs to it.
struct DLFAST_HIDDEN Item {
  HeldTensor param;
  at::Tensor grad;               // of this step
  HeldTensor state[kMaxStates];  // undefined where the group has no such state
  at::ScalarType state_dtype[kMaxStates]{};
  HeldTensor scale[kMaxStates];  // of states in code8
  HeldTensor average;
  HeldTensor master;
  HeldTensor step;
  TensorRef ref{};       // all but the gradient stays the same from step to step
  bool in_order = true;  // parameter and states lie in one order without gaps
  // The parameter's key and its dict in optimizer.state, and what that dict held when the step was prepared.
  py::object key, entry;
  std::vector<std::pair<py::object, py::object>> watched;
};

class DLFAST_HIDDEN PreparedStep {
 public:
  // `items` are Items; `param_lists` are the lists of param_groups and
  // `idle` the parameters among them that have no gradient.
  PreparedStep(const std::string& algorithm, const py::list& items, const py::list& param_lists,
               const py::list& idle);

  // Whether run() would find all as it was; it looks itself.
  bool holds(const py::dict& states, const py::object& grads);
  // Takes a step. None where it no longer holds; else (norm of the gradients or None, skipped).
  // `hyper` holds a tuple of numbers for each group, `grads` the gradients where they are not param.grad.
  py::object run(const py::dict& states, const py::list& hyper, const StepOptions& options,
                 const py::object& grads);
  // The sum of squares of the unscaled, value-clipped gradients; None where it no longer holds.
  py::object squares(const py::dict& states, const StepOptions& options, const py::object& grads);

  // holds(), and the gradients of this step, for whoever runs it: see GradientsHeld in op_layouts.h.
  bool take_gradients(const py::dict& states, const py::object& grads);
  std::vector<Item>& items() { return items_; }
  Algorithm algorithm() const { return algorithm_; }
  bool overlap() const { return overlap_; }

 private:
  void add(Item item);
  at::TensorOptions norm_options() const;
  CpuResult take(const StepOptions& options, std::vector<double> groups);

  Algorithm algorithm_;
  std::vector<Item> items_;
  std::vector<std::pair<py::list, std::vector<PyObject*>>> lists_;  // borrowed: the lists keep them alive
  std::vector<HeldTensor> idle_;
  bool overlap_ = false;  // written tensors share memory
};

// kMaxHyper numbers for each group, of the tuples in `hyper`.
std::vector<double> numbers_of(const py::list& hyper);

void bind_step(py::module_& m);

}  // namespace dlfast::optim
