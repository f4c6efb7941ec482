// Every operator schema of dlfast on one page, and the Python module that carries build facts.
// Backends register their own kernels next to their code (TORCH_LIBRARY_IMPL in the op.cpp files).
#include <torch/extension.h>
#include <torch/library.h>

#include "bn_relu_pool/tensors_state.h"
#include "common/simd.h"
#include "conv_relu_pool/measure_block.h"
#include "conv_relu_pool/measure_cuda.h"
#include "conv_relu_pool/op.h"
#include "conv_relu_pool/plan_cpu_kind.h"
#include "conv_relu_pool/speed.h"
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

  // ---- Batch normalisation, activation and pooling ----------------------------------------------------
  // mean and var [C] are given where they are fixed, and empty in the result; else they are the
  // batch's, var the biased one. code is that of _conv_relu_pool2d for max pooling and else empty.
  m.def(
      "_batch_norm_relu_pool2d(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
      "float eps, str? activation, str? pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, "
      "bool ceil_mode, bool save_code) -> (Tensor output, Tensor code, Tensor batch_mean, Tensor batch_var)");
  // Where output_mask is false the result is an empty tensor.
  m.def(
      "_batch_norm_relu_pool2d_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor var, Tensor code, bool batch_statistics, float eps, str? activation, str? pool, "
      "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode, bool[3] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

namespace {

using PlanRow = std::tuple<std::string, std::string, double, double, double, bool>;
using Pair = std::vector<int64_t>;

std::vector<PlanRow> plan_block(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const Pair& stride,
                                const Pair& padding, const Pair& dilation, int64_t groups,
                                std::optional<std::string> activation, std::optional<std::string> pool,
                                const Pair& pool_size, const Pair& pool_stride, const Pair& pool_padding,
                                bool ceil_mode, bool save_code) {
  const std::array<bool, 3> mask = {input.requires_grad(), weight.requires_grad(),
                                    bias && bias->requires_grad()};
  const dlfast::BlockPlan plan = dlfast::plan_block(
      input, weight, {stride, padding, dilation, groups},
      {activation, pool, pool_size, pool_stride, pool_padding, ceil_mode}, save_code, mask);
  std::vector<PlanRow> rows = {{"convolution", "", plan.flops, 0.0, plan.floor, false}};
  const auto add = [&](const char* part, const dlfast::Choice& choice) {
    for (int i = 0; i < choice.count; ++i) {
      const dlfast::Candidate& c = choice.candidates[i];
      rows.emplace_back(part, dlfast::path_name(c.path), c.flops, c.bytes, c.seconds, i == choice.best);
    }
  };
  add("forward", plan.forward);
  add("grad_input", plan.grad_input);
  add("grad_weight", plan.grad_weight);
#ifdef DLFAST_WITH_CUDA
  const auto geometry = dlfast::Geometry::of(stride, padding, dilation, groups, activation, pool, pool_size,
                                             pool_stride, pool_padding, ceil_mode);
  if (const auto s = dlfast::measured_block(input, weight, bias, geometry, save_code)) {
    rows.emplace_back("block", "eager", 0.0, 0.0, s->eager, s->eager < s->ours);
    rows.emplace_back("block", "operator", 0.0, 0.0, s->ours, s->eager >= s->ours);
  }
#endif
  return rows;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of dlfast; call them through torch.ops.dlfast";
  m.def(
      "simd_level", [] { return std::string(dlfast::simd_name(dlfast::simd_level())); },
      "SIMD level of the CPU kernels in use: 'avx512', 'avx2' or 'default'");
  m.def(
      "planned_cpu", [] { return std::string(dlfast::planned_cpu().name); },
      "The kind of CPU that blocks are planned for, as DLFAST_CPU_KIND names it; '' for this machine's own");
  m.def(
      "plan_block", plan_block,
      "Candidates of each part of a block as (part, name, flops, bytes, seconds, chosen), seconds on CUDA "
      "only; the first row is the convolution as such, its seconds the least there can be. Where PyTorch is "
      "set to measure and has, two rows 'block' say what the whole takes by PyTorch's kernels and by ours");
  py::class_<dlfast::TensorsState>(
      m, "TensorsState", "What tells whether tensors are still the same, unchanged; see tensors_state.h")
      .def(py::init<const std::vector<at::Tensor>&>())
      .def("holds", &dlfast::TensorsState::holds);
  m.def("peak_flops", dlfast::peak_flops, py::call_guard<py::gil_scoped_release>(),
        "Multiplications and additions of float32 per second that the threads of ATen reach");
  m.def("peak_bandwidth", dlfast::peak_bandwidth, py::call_guard<py::gil_scoped_release>(),
        "Bytes per second that the threads of ATen read and write when copying memory");
#ifdef DLFAST_WITH_CUDA
  m.def("forget_measurements", dlfast::forget_measurements,
        "Forgets what was timed under torch.backends.cudnn.benchmark");
#endif
  dlfast::optim::bind_plan(m);
}
