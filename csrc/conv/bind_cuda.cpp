#include "conv/bind_cuda.h"

#ifdef DLFAST_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>
#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "conv/heuristics.h"
#include "conv/measure_cuda.h"
#include "conv/op_cuda.h"

namespace dlfast {
namespace {

namespace py = pybind11;
using Pair = std::vector<int64_t>;
// Numbers of the key, and seconds.
using Entries = std::vector<std::pair<std::vector<int64_t>, std::vector<double>>>;

std::vector<Choice> choose_block_on(int64_t arch, int64_t processors, int64_t shared_bytes, double clock,
                                    double bandwidth, const at::Tensor& input, const at::Tensor& weight,
                                    const Pair& stride, const Pair& padding,
                                    const std::optional<std::string>& activation,
                                    const std::optional<std::string>& pool, const Pair& pool_size,
                                    const Pair& pool_stride, const Pair& pool_padding,
                                    bool save_winner_mask) {
  const Pair one{1, 1};
  const BlockOptions options = SchemaArgs<const BlockOptions&>::from_schema(
      "choose_block_on", stride, padding, one, 1, OptionalName(activation), OptionalName(pool),
      at::IntArrayRef(pool_size), at::IntArrayRef(pool_stride), at::IntArrayRef(pool_padding), false);
  const CudaDevice device{.arch = arch,
                          .code_arch = arch,
                          .processors = processors,
                          .shared_bytes = shared_bytes,
                          .clock = clock,
                          .bandwidth = bandwidth};
  const BlockReport report =
      report_block_on(device, input, weight, options, save_winner_mask, {input.requires_grad(), true, true});
  return {report.forward, report.grad_input, report.grad_weight};
}

Measurements measurements_of(const Entries& entries) {
  Measurements found;
  for (const auto& [numbers, seconds] : entries) found.emplace_back(MemoKey(numbers), seconds);
  return found;
}

Entries entries_of(int64_t device) {
  Entries entries;
  for (const auto& [key, seconds] : all_remembered(device)) entries.emplace_back(key.numbers(), seconds);
  return entries;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("choose_block_on", choose_block_on, py::kw_only(), py::arg("arch"), py::arg("processors"),
        py::arg("shared_bytes"), py::arg("clock"), py::arg("bandwidth"), py::arg("input"), py::arg("weight"),
        py::arg("stride"), py::arg("padding"), py::arg("activation"), py::arg("pool"), py::arg("pool_size"),
        py::arg("pool_stride"), py::arg("pool_padding"), py::arg("save_winner_mask"),
        "What is chosen on a GPU that is described, not there, for forward, grad_input and grad_weight; of "
        "the tensors sizes, strides, dtypes and requires_grad count");
  m.def(
      "cuda_bandwidth", [] { return current_cuda_device().bandwidth; },
      "Bytes per second that the current device's memory moves at most");
  m.def(
      "cuda_versions",
      [] {
        int driver = 0, runtime = 0;
        C10_CUDA_CHECK(cudaDriverGetVersion(&driver));
        C10_CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
        return std::pair(driver, runtime);
      },
      "Versions of CUDA: the newest that the driver knows, and that of the runtime");
  m.def("forget_measurements", forget_measurements,
        "Forgets what was timed under torch.backends.cudnn.benchmark, as a new process has");
  m.def("measurements", entries_of, py::arg("device"),
        "What is remembered for a device: pairs of a key and seconds");
  m.def(
      "remember_measurement",
      [](int64_t device, std::vector<int64_t> key, std::vector<double> seconds) {
        remember(device, MemoKey(std::move(key)), std::move(seconds));
      },
      py::arg("device"), py::arg("key"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
      "Remembers the seconds of a key as a measurement of ours does");
  m.def(
      "keep_measurements",
      [](std::function<Entries(int64_t)> load, std::function<void(int64_t)> save) {
        keep_measurements(
            {.load = [load = std::move(load)](int64_t device) { return measurements_of(load(device)); },
             .save = std::move(save)});
      },
      py::arg("load"), py::arg("save"), "Who keeps measurements across processes; see measure_cuda.h");
}

}  // namespace dlfast
#endif
