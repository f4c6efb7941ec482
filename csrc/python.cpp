// The Python module dlfast._C: build facts, reports, and what does not go through the dispatcher.
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "chain/conv_norm.h"
#include "conv/autograd.h"
#include "conv/bind_cuda.h"
#include "conv/cpu_kind.h"
#include "conv/heuristics.h"
#include "conv/measure_block.h"
#include "core/ran.h"
#include "core/simd.h"
#include "norm/autograd.h"
#include "norm/tensors_state.h"
#include "optim/op_step.h"
#include "simd/speed.h"

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

// The numbers of options as Python has them.
struct WindowArguments {
  std::optional<std::string> activation, pool;
  Pair size, stride, padding;
  bool ceil_mode;
};

dlfast::PoolOptions options_of(const char* op, const WindowArguments& w) {
  return dlfast::pool_options(op, dlfast::OptionalName(w.activation), dlfast::OptionalName(w.pool), w.size,
                              w.stride, w.padding, w.ceil_mode);
}

Report report_block(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const Pair& stride, const Pair& padding, const Pair& dilation, int64_t groups,
                    const std::optional<std::string>& activation, const std::optional<std::string>& pool,
                    const Pair& pool_size, const Pair& pool_stride, const Pair& pool_padding, bool ceil_mode,
                    bool save_winner_mask, double flops, double bandwidth) {
  const dlfast::BlockOptions options{
      dlfast::conv_options("explain", stride, padding, dilation, groups),
      options_of("explain", {activation, pool, pool_size, pool_stride, pool_padding, ceil_mode})};
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

// Calls whose options are checked once and kept: see dlfast/functional/prepared.py.
void bind_prepared(py::module_& m) {
  using dlfast::OptionalTensor;
  using dlfast::PoolOptions;
  using dlfast::PublicOptions;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<PublicOptions>(m, "ConvBlock", "conv_relu_pool2d with its options, for plain tensors")
      .def(py::init([](const Pair& stride, const Pair& padding, const Pair& dilation, int64_t groups,
                       std::optional<std::string> activation, std::optional<std::string> pool, Pair pool_size,
                       Pair pool_stride, Pair pool_padding, bool ceil_mode) {
        constexpr const char* op = "conv_relu_pool2d";
        return PublicOptions{{dlfast::conv_options(op, stride, padding, dilation, groups),
                              options_of(op, {std::move(activation), std::move(pool), std::move(pool_size),
                                              std::move(pool_stride), std::move(pool_padding), ceil_mode})}};
      }))
      .def(
          "__call__",
          [](const PublicOptions& options, const at::Tensor& input, const at::Tensor& weight,
             const OptionalTensor& bias) {
            return dlfast::conv_relu_pool2d_plain(input, weight, bias, options);
          },
          no_gil, "None where the tensors are not plain: that is for the dispatcher");
  py::class_<PoolOptions>(m, "NormBlock", "batch_norm_relu_pool2d with its window, for plain tensors")
      .def(py::init([](std::optional<std::string> activation, std::optional<std::string> pool, Pair pool_size,
                       Pair pool_stride, Pair pool_padding, bool ceil_mode) {
        return options_of("batch_norm_relu_pool2d",
                          {std::move(activation), std::move(pool), std::move(pool_size),
                           std::move(pool_stride), std::move(pool_padding), ceil_mode});
      }))
      .def(
          "__call__",
          [](const PoolOptions& options, const at::Tensor& input, const OptionalTensor& running_mean,
             const OptionalTensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
             bool training, double momentum, double eps) {
            return dlfast::batch_norm_relu_pool2d(input, running_mean, running_var, weight, bias, training,
                                                  momentum, eps, options);
          },
          no_gil, "None where the tensors are not plain, or none that the operator takes");
  py::class_<dlfast::ConvNormOptions>(
      m, "ConvNormBlock", "A convolution and batch_norm_relu_pool2d in training, for plain tensors")
      .def(py::init([](const PublicOptions& conv, const PoolOptions& pool) {
        return dlfast::ConvNormOptions{conv.conv, pool};
      }))
      .def(
          "__call__",
          [](const dlfast::ConvNormOptions& options, const at::Tensor& input, const at::Tensor& weight,
             const OptionalTensor& bias, const OptionalTensor& running_mean,
             const OptionalTensor& running_var, const OptionalTensor& norm_weight,
             const OptionalTensor& norm_bias, double momentum, double eps) {
            return dlfast::conv_norm_pool2d(
                {input, weight, bias, running_mean, running_var, norm_weight, norm_bias}, momentum, eps,
                options);
          },
          no_gil, "None where the tensors are not plain, or none that the operator takes");
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
  bind_prepared(m);
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
