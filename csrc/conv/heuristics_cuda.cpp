// The choice on CUDA. No GPU has confirmed its constants: they follow NVIDIA's documentation, and what is
// between algorithms here is bytes and waves. torch.backends.cudnn.benchmark replaces them by measurements.
#include "conv/heuristics.h"

#ifdef DLFAST_WITH_CUDA
#include <c10/cuda/CUDAFunctions.h>

#include <algorithm>
#include <cmath>

#include "conv/measure_cuda.h"

namespace dlfast {
namespace {

// Multiply-adds of one processor in one clock.
struct Rates {
  int64_t arch;
  double tensor;      // of 16-bit types, by cuDNN's kernels; half of it for TF32
  double tensor_own;  // by mma.sync, which on sm_90 and sm_100 does not reach all of the tensor cores
  double fma;
};

constexpr Rates kRates[] = {{75, 512, 0, 64},    {80, 1024, 1024, 64},  {86, 512, 512, 128},
                            {89, 512, 512, 128}, {90, 2048, 1280, 128}, {100, 4096, 1024, 128},
                            {120, 512, 512, 128}};

constexpr double kConvolutionPart = 0.65;  // of those rates that cuDNN's convolutions reach
constexpr double kOwnPart = 0.5;           // and ours
constexpr double kBandwidthPart = 0.85;
constexpr double kLaunchSeconds = 4e-6;
constexpr double kLeastChannels = 8;  // cuDNN fills input channels up to these
constexpr double kBlocksPerProcessor = 2;
constexpr double kIndexBytes = 8;       // PyTorch's max pooling keeps int64 indices
constexpr double kClearlyFaster = 0.9;  // predictions closer than this leave the choice with cuDNN

const Rates& rates_of(const CudaDevice& device) {
  const Rates* best = &kRates[0];
  for (const Rates& r : kRates) {
    if (r.arch <= device.arch) best = &r;
  }
  return *best;
}

// The sizes and speeds that the costs of one problem are made of.
struct Problem {
  const CudaConv& c;
  const CudaDevice& device;
  bool save_winner_mask;
  double input, weight, z, y, winner_mask, index;  // bytes
  double macs;

  Problem(const CudaConv& conv, const CudaDevice& on, bool saves)
      : c(conv), device(on), save_winner_mask(saves) {
    const auto element = static_cast<double>(element_bytes(c.dtype));
    const ConvParams& p = c.p.conv;
    input = static_cast<double>(p.batch) * p.in_channels * p.input_size[0] * p.input_size[1] * element;
    weight = static_cast<double>(p.out_channels) * p.group_in() * p.positions() * element;
    z = static_cast<double>(c.p.pool.input_numel()) * element;
    y = static_cast<double>(c.p.pool.output_numel()) * element;
    const bool pooled = c.p.pool.pool == Pool::max;
    winner_mask = pooled && save_winner_mask ? static_cast<double>(c.p.pool.output_numel()) : 0;
    index = pooled ? static_cast<double>(c.p.pool.output_numel()) * kIndexBytes : 0;
    macs = convolution_flops(p) / 2;
  }

  bool relu() const { return c.p.pool.activation == Activation::relu; }
  bool pools() const { return c.p.pool.pool != Pool::none; }
  double bandwidth() const { return device.bandwidth * kBandwidthPart; }

  double macs_per_second(double part, double Rates::* tensor) const {
    const Rates& r = rates_of(device);
    double rate = r.fma;
    if (c.math_mode == MathMode::tensor_core) {
      rate = r.*tensor * (c.dtype == Dtype::float32 ? 0.5 : 1.0);
    } else if (c.dtype == Dtype::float64) {
      rate = r.fma / 2;
    } else if (c.dtype != Dtype::float32) {
      rate = std::max(r.fma, r.*tensor);  // what we have no kernel for, cuDNN may have
    }
    return rate * part * device.clock * static_cast<double>(device.processors);
  }

  double pass(double bytes) const { return bytes / bandwidth() + kLaunchSeconds; }

  // One of PyTorch's convolutions, forward or either gradient.
  double convolution(double bytes) const {
    const double in = static_cast<double>(c.p.conv.group_in());
    const double filled = macs * std::max(1.0, kLeastChannels / in);
    const double compute = filled / macs_per_second(kConvolutionPart, &Rates::tensor);
    return std::max(compute, bytes / bandwidth()) + kLaunchSeconds;
  }

  // One of our kernels: blocks run in waves, and the last one may be mostly empty.
  double single(const ConvWork& work, double bytes) const {
    const double at_once = kBlocksPerProcessor * static_cast<double>(device.processors);
    const double waves = std::ceil(static_cast<double>(work.blocks) / at_once);
    const double compute = waves * at_once * work.macs / macs_per_second(kOwnPart, &Rates::tensor_own);
    return std::max(compute, bytes / bandwidth()) + kLaunchSeconds;
  }
};

class Candidates {
 public:
  void add(Algorithm algorithm, double bytes, double seconds) {
    Candidate& c = choice_.candidates[choice_.count++];
    c = {.algorithm = algorithm, .seconds = seconds, .bytes = bytes};
  }

  // Measured seconds in place of predicted ones. PyTorch's kernels one by one are measured as a whole block
  // only (see measure_block.h), and a prediction cannot be compared with these.
  void measured(double pytorch, double single) {
    measured_ = true;
    const Choice all = choice_;
    choice_.count = 0;
    for (int i = 0; i < all.count; ++i) {
      const Candidate& c = all.candidates[i];
      if (c.algorithm != Algorithm::eager)
        add(c.algorithm, c.bytes, c.algorithm == Algorithm::pytorch ? pytorch : single);
    }
  }

  // Among the algorithms of the operator: PyTorch's kernels one by one are for its caller to run.
  Choice choose(std::string_view forced) {
    const int pytorch = find(Algorithm::pytorch), single = find(Algorithm::single);
    choice_.best = pytorch;
    if (single >= 0 && forced != "pytorch") {
      const double least = measured_ ? 1.0 : kClearlyFaster;
      const double limit = choice_.candidates[pytorch].seconds * least;
      if (forced == "single" || choice_.candidates[single].seconds < limit) choice_.best = single;
    }
    choice_.reason = measured_ && forced == "" ? "measured" : reason_of(choice_, forced);
    return choice_;
  }

 private:
  int find(Algorithm algorithm) const {
    for (int i = 0; i < choice_.count; ++i) {
      if (choice_.candidates[i].algorithm == algorithm) return i;
    }
    return -1;
  }
  Choice choice_{};
  bool measured_ = false;
};

void add_forward(const Problem& q, Candidates& candidates) {
  const double in = q.input + q.weight;
  const double passes = q.pools() + q.relu() + 1.0;  // and the bias
  const double eager_bytes =
      in + q.z + 2 * q.z * (passes - (q.pools() ? 1 : 0)) + (q.pools() ? q.z + q.y + q.index : 0);
  candidates.add(
      Algorithm::eager, eager_bytes,
      q.convolution(in + q.z) + (eager_bytes - in - q.z) / q.bandwidth() + passes * kLaunchSeconds);
  candidates.add(Algorithm::pytorch, in + 2 * q.z + q.y + q.winner_mask,
                 q.convolution(in + q.z) + q.pass(q.z + q.y + q.winner_mask));
  if (const auto work = conv_forward_work(q.c, q.device)) {
    const double bytes = in + q.y + q.winner_mask;
    candidates.add(Algorithm::single, bytes, q.single(*work, bytes));
  }
}

// What pooling and ReLU cost before the gradients of the convolution can be had; half for each of them.
struct Expanding {
  double eager_bytes, eager, own_bytes, own;

  explicit Expanding(const Problem& q) {
    const double pool = q.pools() ? 2 * q.z + q.y + q.index : 0, relu = q.relu() ? 3 * q.z : 0;
    eager_bytes = (pool + relu) / 2;
    eager = eager_bytes / q.bandwidth() + (2 * q.pools() + q.relu()) * kLaunchSeconds / 2;
    const double expanded = q.pools() ? q.y + q.winner_mask + q.z : q.relu() ? 3 * q.z : 0;
    own_bytes = expanded / 2;
    own = expanded == 0 ? 0 : q.pass(expanded) / 2;
  }
};

double gradient_bytes(const Problem& q) {
  return q.pools() ? q.y + q.winner_mask : q.relu() ? 2 * q.y : q.y;
}

void add_grad_input(const Problem& q, Candidates& candidates) {
  const Expanding expanding(q);
  const double dense = q.z + q.weight + q.input, own = gradient_bytes(q) + q.weight + q.input;
  candidates.add(Algorithm::eager, dense + expanding.eager_bytes, q.convolution(dense) + expanding.eager);
  candidates.add(Algorithm::pytorch, dense + expanding.own_bytes, q.convolution(dense) + expanding.own);
  if (const auto work = conv_grad_input_work(q.c, q.device))
    candidates.add(Algorithm::single, own, q.single(*work, own));
}

void add_grad_weight(const Problem& q, Candidates& candidates) {
  const Expanding expanding(q);
  const double dense = q.z + q.weight + q.input, own = gradient_bytes(q) + q.weight + q.input;
  // And once more for grad_bias: what is dense, or where our kernel takes it, what it is expanded from.
  const double eager = dense + q.z, epilogue = dense + gradient_bytes(q);
  candidates.add(Algorithm::eager, eager + expanding.eager_bytes, q.convolution(eager) + expanding.eager);
  candidates.add(Algorithm::pytorch, epilogue + expanding.own_bytes, q.convolution(epilogue) + expanding.own);
  if (conv_grad_weight_fits(q.c, q.device)) {
    const auto processors = static_cast<double>(q.device.processors) * kBlocksPerProcessor;
    const ConvWork even{.blocks = static_cast<int64_t>(processors), .macs = q.macs / processors};
    candidates.add(Algorithm::single, own, q.single(even, own) + kLaunchSeconds);  // and the sum of its parts
  }
}

// What each algorithm of one gradient costs beside the fastest of the other. Both dense ones share an
// expansion, which counts with grad_input where that one is dense; so the chosen parts add up to the whole.
void measured_backward(const BackwardSeconds& s, bool needs_input, Part part, Candidates& candidates) {
  const auto cost = [&](bool dense_input, bool dense_weight) {
    return (dense_input ? s.dense_input : s.own_input) + (dense_weight ? s.dense_weight : s.own_weight) +
           (dense_input || dense_weight ? s.expand : 0.0);
  };
  if (!needs_input) return candidates.measured(cost(false, true), cost(false, false));
  const double dense_input = std::min(cost(true, true), cost(true, false));
  const double own_input = std::min(cost(false, true), cost(false, false));
  const double of_input = dense_input <= own_input ? s.dense_input + s.expand : s.own_input;
  const double of_weight = std::min(dense_input, own_input) - of_input;
  if (part == Part::grad_input) return candidates.measured(dense_input - of_weight, own_input - of_weight);
  candidates.measured(std::min(cost(true, true), cost(false, true)) - of_input,
                      std::min(cost(true, false), cost(false, false)) - of_input);
}

}  // namespace

Choice choose_cuda(const ConvBlockParams& p, const Context& context, Part part) {
  const CudaConv c{.p = p, .dtype = context.dtype, .math_mode = context.math_mode};
  const Problem problem(c, *context.device, context.save_winner_mask || part != Part::forward);
  Candidates candidates;
  switch (part) {
    case Part::forward:
      add_forward(problem, candidates);
      break;
    case Part::grad_input:
      add_grad_input(problem, candidates);
      break;
    case Part::grad_weight:
      add_grad_weight(problem, candidates);
      break;
  }
  const int device = c10::cuda::current_device();
  if (part == Part::forward) {
    if (const auto s = remembered(forward_key(c, device, problem.save_winner_mask)))
      candidates.measured(s->at(0), s->at(1));
  } else if (const auto s = remembered(backward_key(c, device, context.mask))) {
    measured_backward(BackwardSeconds::of(*s), context.mask[0], part, candidates);
  }
  return candidates.choose(forced_algorithm());
}

double floor_seconds(const ConvBlockParams& p, const Context& context) {
  const CudaConv c{.p = p, .dtype = context.dtype, .math_mode = context.math_mode};
  const Problem q(c, *context.device, context.save_winner_mask);
  const double bytes = q.input + q.weight + q.y + q.winner_mask;
  return std::max(q.macs / q.macs_per_second(1.0, &Rates::tensor), bytes / context.device->bandwidth);
}

}  // namespace dlfast
#endif
