// Every operator schema of dlfast on one page, and the Python module that carries build facts.
// Backends register their own kernels next to their winner mask (TORCH_LIBRARY_IMPL in the op.cpp files).
#include <torch/extension.h>
#include <torch/library.h>

#include "conv/bind_cuda.h"
#include "conv/cpu_kind.h"
#include "conv/heuristics.h"
#include "conv/measure_block.h"
#include "core/ran.h"
#include "core/simd.h"
#include "norm/tensors_state.h"
#include "optim/op_step.h"
#include "simd/speed.h"

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
  // mean and var [C] are given where they are fixed, and empty in the result; else they are the
  // batch's, var the biased one. winner_mask is that of _conv_relu_pool2d for max pooling and else empty.
  m.def(
      "_batch_norm_relu_pool2d(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
      "float eps, str? activation, str? pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, "
      "bool ceil_mode, bool save_winner_mask) -> (Tensor output, Tensor winner_mask, Tensor batch_mean, "
      "Tensor batch_var)");
  // Where output_mask is false the result is an empty tensor.
  m.def(
      "_batch_norm_relu_pool2d_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor var, Tensor winner_mask, bool batch_statistics, float eps, str? activation, str? "
      "pool, "
      "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode, bool[3] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

namespace {

namespace py = pybind11;
using dlfast::BlockReport;
using dlfast::Candidate;
using dlfast::Choice;
using Pair = std::vector<int64_t>;

// A report, and what the whole block was measured to take where PyTorch is set to measure.
struct Report : BlockReport {
  std::optional<double> measured_ours, measured_eager;
};

Report report_block(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const Pair& stride, const Pair& padding, const Pair& dilation, int64_t groups,
                    const std::optional<std::string>& activation, const std::optional<std::string>& pool,
                    const Pair& pool_size, const Pair& pool_stride, const Pair& pool_padding, bool ceil_mode,
                    bool save_winner_mask, double flops, double bandwidth) {
  const dlfast::BlockOptions options = dlfast::SchemaArgs<const dlfast::BlockOptions&>::from_schema(
      "explain", stride, padding, dilation, groups, dlfast::OptionalName(activation),
      dlfast::OptionalName(pool), at::IntArrayRef(pool_size), at::IntArrayRef(pool_stride),
      at::IntArrayRef(pool_padding), ceil_mode);
  const dlfast::Mask mask = {input.requires_grad(), weight.requires_grad(), bias && bias->requires_grad()};
  Report report{dlfast::report_block(input, weight, options, save_winner_mask, mask, flops, bandwidth),
                std::nullopt, std::nullopt};
#ifdef DLFAST_WITH_CUDA
  if (const auto s = dlfast::measured_block(input, weight, bias, options, save_winner_mask)) {
    report.measured_ours = s->ours;
    report.measured_eager = s->eager;
  }
#endif
  return report;
}

void bind_reports(py::module_& m) {
  py::class_<Candidate>(m, "Candidate")
      .def_property_readonly("algorithm", [](const Candidate& c) { return dlfast::name_of(c.algorithm); })
      .def_readonly("seconds", &Candidate::seconds)
      .def_readonly("bytes", &Candidate::bytes);
  py::class_<Choice>(m, "Choice")
      .def_property_readonly("candidates",
                             [](const Choice& c) {
                               return std::vector<Candidate>(c.candidates.begin(),
                                                             c.candidates.begin() + c.count);
                             })
      .def_readonly("best", &Choice::best)
      .def_readonly("reason", &Choice::reason);
  py::class_<Report>(m, "BlockReport")
      .def_readonly("flops", &Report::flops)
      .def_readonly("floor", &Report::floor)
      .def_readonly("forward", &Report::forward)
      .def_readonly("grad_input", &Report::grad_input)
      .def_readonly("grad_weight", &Report::grad_weight)
      .def_readonly("basis", &Report::basis)
      .def_readonly("measured_ours", &Report::measured_ours)
      .def_readonly("measured_eager", &Report::measured_eager);
  m.def("report_block", report_block, py::kw_only(), py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("activation"),
        py::arg("pool"), py::arg("pool_size"), py::arg("pool_stride"), py::arg("pool_padding"),
        py::arg("ceil_mode"), py::arg("save_winner_mask"), py::arg("flops"), py::arg("bandwidth"),
        "What is chosen for a block and why; flops and bandwidth are what this CPU reaches");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of dlfast; call them through torch.ops.dlfast";
  m.def(
      "simd_level", [] { return std::string(dlfast::simd_name(dlfast::simd_level())); },
      "SIMD level of the CPU kernels in use: 'avx512', 'avx2' or 'default'");
  m.def(
      "assumed_cpu", [] { return std::string(dlfast::assumed_cpu().name); },
      "The kind of CPU that algorithms are chosen for, as DLFAST_CPU_KIND names it; '' for this machine's "
      "own");
  bind_reports(m);
  m.def(
      "ran",
      [] {
        std::vector<std::tuple<std::string, std::string, std::string, std::string, int64_t>> counts;
        for (const dlfast::RanCount& c : dlfast::RanTable::counts()) {
          counts.emplace_back(c.op, c.device, c.part, c.algorithm, c.count);
        }
        return counts;
      },
      "What ran since the start of the process: (operator, device, part, algorithm, how often)");
  py::class_<dlfast::TensorsState>(
      m, "TensorsState", "What tells whether tensors are still the same, unchanged; see tensors_state.h")
      .def(py::init<const std::vector<at::Tensor>&>())
      .def("holds", &dlfast::TensorsState::holds);
  m.def("peak_flops", dlfast::peak_flops, py::call_guard<py::gil_scoped_release>(),
        "Multiplications and additions of float32 per second that the threads of ATen reach");
  m.def("peak_bandwidth", dlfast::peak_bandwidth, py::call_guard<py::gil_scoped_release>(),
        "Bytes per second that the threads of ATen read and write when copying memory");
#ifdef DLFAST_WITH_CUDA
  dlfast::bind_cuda(m);
#endif
  dlfast::optim::bind_step(m);
}
