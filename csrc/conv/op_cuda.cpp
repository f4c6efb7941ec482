#include "conv/op_cuda.h"

#ifdef DLFAST_WITH_CUDA
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/StringUtil.h>

#include <cuda_runtime_api.h>
#include "conv/heuristics.h"
#include "conv/measure_cuda.h"
#include "core/launch_check.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <string_view>

namespace dlfast {

const CudaDevice& current_cuda_device() {
  constexpr int kMostDevices = 64;
  static std::array<CudaDevice, kMostDevices> devices;
  static std::array<std::once_flag, kMostDevices> asked;
  const int index = c10::cuda::current_device();
  TORCH_CHECK(index < kMostDevices, "dlfast knows at most ", kMostDevices, " CUDA devices, got device ",
              index);
  std::call_once(asked[index], [index] {
    const auto attribute = [index](cudaDeviceAttr which) {
      int value = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
      return static_cast<int64_t>(value);
    };
    devices[index] = {.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                              attribute(cudaDevAttrComputeCapabilityMinor),
                      .code_arch = code_architecture(),
                      .processors = attribute(cudaDevAttrMultiProcessorCount),
                      .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      .clock = 1e3 * static_cast<double>(attribute(cudaDevAttrClockRate)),
                      // Memory moves data on both edges of its clock.
                      .bandwidth = 2e3 * static_cast<double>(attribute(cudaDevAttrMemoryClockRate)) *
                                   static_cast<double>(attribute(cudaDevAttrGlobalMemoryBusWidth)) / 8};
    // Some drivers keep them to themselves; the algorithms are still compared.
    if (devices[index].clock <= 0) devices[index].clock = 1.5e9;
    if (devices[index].bandwidth <= 0) devices[index].bandwidth = 1e12;
  });
  return devices[index];
}

namespace {

using at::Tensor;
constexpr auto kLast = at::MemoryFormat::ChannelsLast;

void* current_stream(const Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}

const void* pointer(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.const_data_ptr() : nullptr;
}

// The problem, for the message of an error in any of its launches.
auto described(const char* part, const CudaConv& c) {
  return [part, &c] {
    const ConvParams& p = c.p.conv;
    return c10::str(part, " for input [", p.batch, ", ", p.in_channels, ", ", p.input_size[0], ", ",
                    p.input_size[1], "] and weight [", p.out_channels, ", ", p.in_channels, ", ", p.kernel[0],
                    ", ", p.kernel[1], "]");
  };
}

}  // namespace

MathMode cuda_math_mode(Dtype dtype, const CudaDevice& device) {
  // fma does without tensor cores, as devices before sm_80 do; for tests.
  const char* asked = std::getenv("DLFAST_MATH_MODE");
  if (asked == nullptr)
    asked = std::getenv("DLFAST_PRODUCTS");  // the old name: dlfast/_native.py warns of it
  const std::string_view forced = asked == nullptr ? "" : asked;
  TORCH_CHECK_VALUE(forced == "" || forced == "fma", "DLFAST_MATH_MODE must be fma or unset, got ", forced);
  if (dtype == Dtype::float64 || device.code_arch < 80 || forced == "fma") return MathMode::fma;
  const bool wanted = dtype != Dtype::float32 || at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  return wanted ? MathMode::tensor_core : MathMode::fma;
}

void single_forward(const CudaConv& c, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    Tensor& output, Tensor& winner_mask) {
  const Tensor x = input.contiguous(kLast), w = weight.contiguous(kLast);
  const Tensor b = is_given(bias) ? bias->contiguous() : Tensor();
  naming(described("conv_forward", c), [&] {
    conv_forward(c, x.const_data_ptr(), w.const_data_ptr(), pointer(b), output.data_ptr(),
                 winner_mask.numel() == 0 ? nullptr : winner_mask.data_ptr(), current_stream(input));
  });
}

Tensor single_grad_input(const CudaConv& c, const Tensor& input, const Tensor& weight,
                         const Tensor& grad_output, const Tensor& winner_mask) {
  const Tensor grad = grad_output.contiguous(kLast);
  const Tensor turned = weight.flip({2, 3}).transpose(0, 1).contiguous(kLast);
  Tensor grad_input = at::empty(input.sizes(), input.options().memory_format(kLast));
  naming(described("conv_grad_input", c), [&] {
    conv_grad_input(c, turned.const_data_ptr(), grad.const_data_ptr(), pointer(winner_mask),
                    grad_input.data_ptr(), current_stream(input));
  });
  return grad_input;
}

Tensor cuda_grad_bias(const ReluPoolParams& p, Dtype dtype, const Tensor& grad, const Tensor& winner_mask) {
  const Tensor g = grad.contiguous(p.channels_last ? kLast : at::MemoryFormat::Contiguous);
  Tensor grad_bias = at::zeros({p.channels}, g.options());
  if (g.numel() == 0) return grad_bias;
  const auto sums = dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  const Tensor workspace = at::empty({grad_bias_workspace(p)}, g.options().dtype(sums));
  naming([&] { return c10::str("grad_bias for grad_output ", g.sizes()); },
         [&] {
           grad_bias_cuda(p, dtype, g.const_data_ptr(), p.pool == Pool::avg ? nullptr : pointer(winner_mask),
                          workspace.data_ptr(), grad_bias.data_ptr(), current_stream(g));
         });
  return grad_bias;
}

std::tuple<Tensor, Tensor> single_grad_weight(const CudaConv& c, const Tensor& input, const Tensor& weight,
                                              const Tensor& grad_output, const Tensor& winner_mask) {
  const Tensor x = input.contiguous(kLast), grad = grad_output.contiguous(kLast);
  Tensor grad_weight = at::empty(weight.sizes(), weight.options().memory_format(kLast));
  Tensor grad_bias = at::empty({c.p.conv.out_channels}, weight.options());
  const Tensor workspace =
      at::empty({conv_grad_weight_workspace(c, current_cuda_device())}, input.options().dtype(at::kFloat));
  naming(described("conv_grad_weight", c), [&] {
    conv_grad_weight(c, x.const_data_ptr(), grad.const_data_ptr(), pointer(winner_mask),
                     grad_weight.data_ptr(), grad_bias.data_ptr(), workspace.data_ptr<float>(),
                     current_stream(input));
  });
  return {grad_weight, grad_bias};
}

void measure_forward(const CudaConv& c, bool save_winner_mask, const Tensor& input,
                     const std::function<void()>& epilogue, const std::function<void()>& single) {
  if (!may_measure(input) || is_forced_on_cuda() || !conv_forward_work(c, current_cuda_device())) return;
  const int64_t index = input.device().index();
  const MemoKey key = forward_key(c, save_winner_mask);
  if (!remembered(index, key)) remember(index, key, {seconds_of(epilogue), seconds_of(single)});
}

void measure_backward(const CudaConv& c, const Tensor& input, Mask mask, const BackwardTrials& trials) {
  if (!mask[1] || !may_measure(input) || is_forced_on_cuda()) return;
  const CudaDevice& device = current_cuda_device();
  const bool fits_input = mask[0] && conv_grad_input_work(c, device).has_value();
  const bool fits_weight = conv_grad_weight_fits(c, device);
  if (!fits_input && !fits_weight) return;
  const int64_t index = input.device().index();
  const MemoKey key = backward_key(c, mask);
  if (remembered(index, key)) return;
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const BackwardSeconds found{.expand = seconds_of(trials.expand),
                              .dense_input = mask[0] ? seconds_of(trials.dense_input) : 0.0,
                              .own_input = !mask[0]     ? 0.0
                                           : fits_input ? seconds_of(trials.own_input)
                                                        : kNever,
                              .dense_weight = seconds_of(trials.dense_weight),
                              .own_weight = fits_weight ? seconds_of(trials.own_weight) : kNever};
  remember(index, key, list_of(found));
}

}  // namespace dlfast
#endif
