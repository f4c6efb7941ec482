#include "conv/heuristics.h"

#include <ATen/Parallel.h>
#include <ATen/TracerMode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cstdlib>

#include "conv/cpu_kind.h"
#include "core/checks.h"
#ifdef DLFAST_WITH_CUDA
#include "conv/measure_cuda.h"
#include "conv/op_cuda.h"
#include "conv/predict_cuda.h"
#endif

namespace dlfast {

using at::Tensor;

namespace {

constexpr std::string_view kForced[] = {"direct", "masked", "winograd2", "winograd4", "pytorch", "single"};

}  // namespace

// direct, winograd2 or winograd4 takes our kernels wherever they accept the problem, even where they are
// slower, forward by the one named and backward the sparse ones; masked is direct with grad_weight by the
// masked kernel where that accepts it; single does the same on CUDA; pytorch never takes them. What is for
// the other device leaves this one its own choice.
std::string_view forced_algorithm() {
  const char* asked = std::getenv("DLFAST_ALGORITHM");
  if (asked == nullptr) asked = std::getenv("DLFAST_PLAN");  // the old names: dlfast/_native.py warns of them
  std::string_view forced = asked == nullptr ? "" : asked;
  if (forced == "epilogue") forced = "pytorch";
  TORCH_CHECK_VALUE(
      forced == "" || std::find(std::begin(kForced), std::end(kForced), forced) != std::end(kForced),
      "DLFAST_ALGORITHM must be direct, masked, winograd2, winograd4, pytorch or single, got ", forced);
  return forced;
}

bool is_forced_on_cuda() {
  const std::string_view forced = forced_algorithm();
  return forced == "single" || forced == "pytorch";
}

const char* reason_of(const Choice& choice, std::string_view forced) {
  const auto end = choice.candidates.begin() + choice.count;
  const bool taken = std::any_of(choice.candidates.begin(), end, [](const Candidate& c) {
    return c.algorithm != Algorithm::eager && c.algorithm != Algorithm::pytorch;
  });
  if (forced != "") return "DLFAST_ALGORITHM asks for it";
  if (!taken) return "our kernels do not take this problem";
  return choice.algorithm() == Algorithm::pytorch ? "PyTorch's kernels are faster here" : "the fastest";
}

double convolution_flops(const ConvParams& conv) {
  return 2.0 * static_cast<double>(conv.batch) * conv.out_channels * conv.output_size[0] *
         conv.output_size[1] * conv.group_in() * conv.positions();
}

Context context_of(const Tensor& input, Dtype dtype, bool save_winner_mask, Mask mask) {
  Context context{.dtype = dtype,
                  .cpu = input.is_cpu() && input.numel() > 0,
                  .save_winner_mask = save_winner_mask,
                  .threads = at::get_num_threads(),
                  .flops = 1.0,
                  .device = nullptr,
                  .math_mode = MathMode::fma,
                  .device_index = input.device().index(),
                  .mask = mask};
  if (context.cpu) context.flops = assumed_cpu().nominal_flops() * static_cast<double>(context.threads);
#ifdef DLFAST_WITH_CUDA
  if (input.is_cuda() && input.numel() > 0) {
    context.device = &current_cuda_device();
    context.math_mode = cuda_math_mode(dtype, *context.device);
  }
#endif
  return context;
}

Choice choose(const ConvBlockParams& p, const Context& context, Part part) {
#ifdef DLFAST_WITH_CUDA
  if (context.device != nullptr) return choose_cuda(p, context, part);
#endif
  if (context.cpu) return choose_cpu(p, context, part);
  Choice choice{};
  choice.candidates[choice.count++] = {Algorithm::pytorch, 0.0, 0.0};
  choice.reason = "there is nothing to compute";
  return choice;
}

namespace {

bool has_numbers(const Tensor& t) {
  return !t.key_set().has(c10::DispatchKey::Python) && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

// What is chosen now would become a constant of the program that somebody traces.
bool is_traced() {
  return c10::impl::dispatch_mode_enabled() || at::tracer::impl::is_dispatch_enabled();
}

// On CUDA the operator itself chooses: where PyTorch is set to measure, it measures first. Only a convolution
// with nothing after it may be none of ours from the start.
bool predicts_plain_convolution([[maybe_unused]] const Tensor& input,
                                [[maybe_unused]] const BlockOptions& options) {
#ifdef DLFAST_WITH_CUDA
  return input.is_cuda() && options.pool.is_nothing() && !goes_by_measurements(input);
#else
  return false;
#endif
}

}  // namespace

BlockChoice choose_block(const Tensor& input, const Tensor& weight, const BlockOptions& options,
                         bool backward) {
  if (!has_numbers(input) || !has_numbers(weight) || input.dim() != 4) return {};
  if (!input.is_cpu() && !predicts_plain_convolution(input, options)) return {};
  constexpr const char* op = "conv_relu_pool2d";
  const Dtype dtype = check_dtype(op, "input", input);
  check_alike(op, "weight", weight, "input", input);
  const ConvBlockParams p = params_of(op, options, input, weight);
  const c10::OptionalDeviceGuard guard(input.device());
  const Context context = context_of(input, dtype, backward);
  BlockChoice block;
  bool pytorch = input.numel() > 0;
  const auto take = [&](Part part) {
    const Algorithm algorithm = choose(p, context, part).algorithm();
    block.algorithms[part] = static_cast<int64_t>(algorithm);
    pytorch = pytorch && algorithm == Algorithm::pytorch;
  };
  take(Part::forward);
  if (backward) {
    take(Part::grad_input);
    take(Part::grad_weight);
  }
  block.is_plain_convolution = pytorch && options.pool.is_nothing();
  if (is_traced() || !input.is_cpu()) block.algorithms = {};
  return block;
}

Algorithm chosen_or_choose(const ChosenAlgorithms& algorithms, const ConvBlockParams& p,
                           const Context& context, Part part) {
  if (algorithms[part] == ChosenAlgorithms::kNotChosen) return choose(p, context, part).algorithm();
  const auto algorithm = static_cast<Algorithm>(algorithms[part]);
  TORCH_CHECK(algorithm == Algorithm::pytorch || (context.cpu && takes_on_cpu(p, context, part, algorithm)),
              "conv_relu_pool2d: the algorithm ", name_of(algorithm), " does not compute ",
              kPartNames[static_cast<int>(part)], " of this problem");
  return algorithm;
}

namespace {

constexpr const char* kExplain = "explain";

// Its floor and basis are those of the device.
BlockReport report_of(const ConvBlockParams& p, const Context& context) {
  return {.flops = convolution_flops(p.conv),
          .floor = 0,
          .forward = choose(p, context, Part::forward),
          .grad_input = choose(p, context, Part::grad_input),
          .grad_weight = choose(p, context, Part::grad_weight),
          .basis = ""};
}

#ifdef DLFAST_WITH_CUDA
BlockReport cuda_report_of(const ConvBlockParams& p, const Context& context) {
  BlockReport report = report_of(p, context);
  const CudaConv c{.p = p, .dtype = context.dtype, .math_mode = context.math_mode};
  report.floor = floor_seconds(c, *context.device, context.save_winner_mask);
  report.basis = basis_of(*context.device);
  return report;
}
#endif

}  // namespace

BlockReport report_block(const Tensor& input, const Tensor& weight, const BlockOptions& options,
                         bool save_winner_mask, Mask mask, double flops, double bandwidth) {
  const Dtype dtype = check_dtype(kExplain, "input", input);
  const ConvBlockParams p = params_of(kExplain, options, input, weight);
  const c10::OptionalDeviceGuard guard(input.device());
  Context context = context_of(input, dtype, save_winner_mask, mask);
#ifdef DLFAST_WITH_CUDA
  if (context.device != nullptr) return cuda_report_of(p, context);
#endif
  if (context.cpu) context.flops = flops;
  BlockReport report = report_of(p, context);
  const Choice& forward = report.forward;
  double bytes = forward.candidates[0].bytes;
  for (int i = 1; i < forward.count; ++i) bytes = std::min(bytes, forward.candidates[i].bytes);
  report.floor = context.cpu ? std::max(report.flops / flops, bytes / bandwidth) : 0.0;
  return report;
}

#ifdef DLFAST_WITH_CUDA
BlockReport report_block_on(const CudaDevice& device, const Tensor& input, const Tensor& weight,
                            const BlockOptions& options, bool save_winner_mask, Mask mask) {
  const Dtype dtype = check_dtype(kExplain, "input", input);
  const ConvBlockParams p = params_of(kExplain, options, input, weight);
  Context context = context_of(input, dtype, save_winner_mask, mask);
  context.device = &device;
  context.device_index = Context::kDescribed;
  context.math_mode = cuda_math_mode(dtype, device);
  return cuda_report_of(p, context);
}
#endif

}  // namespace dlfast
