#include "conv/predict_cuda.h"

#ifdef DLFAST_WITH_CUDA
#include <algorithm>
#include <cmath>
#include <limits>

namespace dlfast {
namespace {

constexpr int64_t kMeasured = 90;

// Multiply-adds of one processor in one clock, by NVIDIA's documentation.
struct Rates {
  int64_t arch;
  double tensor;      // of 16-bit types, by cuDNN's kernels; half of it for TF32
  double tensor_own;  // by mma.sync, which on sm_90 and sm_100 does not reach all of the tensor cores
  double fma;
};

constexpr Rates kRates[] = {{75, 512, 0, 64},    {80, 1024, 1024, 64},  {86, 512, 512, 128},
                            {89, 512, 512, 128}, {90, 2048, 1280, 128}, {100, 4096, 1024, 128},
                            {120, 512, 512, 128}};

// The parts of those rates that kernels reached on an H100 with channels to spare.
struct Parts {
  double dense;         // cuDNN's forward and gradient of the input
  double dense_weight;  // its gradient of the weight
  double own;           // our forward and gradient of the input
  double own_weight;
};

constexpr Parts kNarrow{.dense = 0.9, .dense_weight = 0.63, .own = 0.49, .own_weight = 0.31};  // 16 bits
constexpr Parts kTf32{.dense = 0.9, .dense_weight = 0.37, .own = 0.37, .own_weight = 0.2};
constexpr Parts kFma{.dense = 0.6, .dense_weight = 0.6, .own = 0.37, .own_weight = 0.36};

// cuDNN's tensor-core kernels begin and end each tile alike, however long the sum in between is: with so many
// channels they reach half of their part.
constexpr double kHalfSummed = 24, kHalfWritten = 36, kHalfOfWeight = 36;
constexpr double kLeastChannels = 8;  // and they fill input channels up to these
// The gradient of the weight has tiles of this many input channels, and what does not fill one is slower.
constexpr int64_t kWeightTile = 64;
constexpr double kPartialTile = 0.4;

// Our kernels compute up to 64 channels of a tile at once. Where there are 32 or fewer, each number that is
// loaded serves half as many products.
constexpr int64_t kFewOutputs = 32;
constexpr double kFewOutputsPart = 0.62;
constexpr double kBlocksPerProcessor = 2;
// Clocks of a processor for every number of a result: bias, pooling and storing it.
constexpr double kFinishClocks = 0.3;
// The same for the gradient of first layers' weights, which unpacks the gradient number by number.
constexpr double kUnpackClocks = 0.52;
constexpr int64_t kFirstChannels = 4;

// PyTorch's kernels for the bias, its gradient and pooling are bound by such clocks rather than by memory.
constexpr double kEagerClocks = 0.87;
constexpr double kIndexBytes = 8;  // its max pooling keeps int64 indices
constexpr double kBandwidthPart = 0.85;
constexpr double kLaunchSeconds = 4e-6;

const Rates& rates_of(const CudaDevice& device) {
  const Rates* best = &kRates[0];
  for (const Rates& r : kRates) {
    if (r.arch <= device.arch) best = &r;
  }
  return *best;
}

// 1/2 at `half`, towards 1 for many.
double share(double channels, double half) {
  return channels / (channels + half);
}

// The sizes and speeds that the costs of one problem are made of.
class Problem {
 public:
  double input, weight, z, y, winner_mask, index;  // bytes
  double inputs, outputs;                          // numbers of the input and of the convolution output
  double macs;

  Problem(const CudaConv& c, const CudaDevice& device, bool saves) : c_(c), device_(device) {
    const auto element = static_cast<double>(element_bytes(c.dtype));
    const ConvParams& p = c.p.conv;
    const auto of_weight = static_cast<double>(p.out_channels) * p.group_in() * p.positions();
    const auto pooled = static_cast<double>(c.p.pool.output_numel());
    inputs = static_cast<double>(p.batch) * p.in_channels * p.input_size[0] * p.input_size[1];
    outputs = static_cast<double>(c.p.pool.input_numel());
    input = inputs * element;
    weight = of_weight * element;
    z = outputs * element;
    y = pooled * element;
    const bool max = c.p.pool.pool == Pool::max;
    winner_mask = max && saves ? pooled : 0;
    index = max ? pooled * kIndexBytes : 0;
    macs = outputs * p.group_in() * p.positions();
  }

  bool relu() const { return c_.p.pool.activation == Activation::relu; }
  bool pools() const { return c_.p.pool.pool != Pool::none; }

  // What a gradient of ours reads of the one of the output.
  double gradient() const { return pools() ? y + winner_mask : relu() ? 2 * y : y; }
  double dense() const { return z + weight + input; }
  double own_gradient() const { return gradient() + weight + input; }

  // Whether anything follows the convolution. Where nothing does, there mostly is no bias either.
  bool nothing() const { return !relu() && !pools(); }

  // A kernel that is bound by memory, and one of PyTorch's that makes or reads `numbers` one by one.
  double pass(double bytes) const {
    return bytes == 0 ? 0 : bytes / (device_.bandwidth * kBandwidthPart) + kLaunchSeconds;
  }
  double eager_pass(double bytes, double numbers) const {
    return bytes == 0 ? 0 : std::max(pass(bytes), clocks(numbers * kEagerClocks) + kLaunchSeconds);
  }

  double dense_forward() const { return convolution(group_in(), out_channels(), input + weight + z); }
  double dense_input() const {
    return convolution(static_cast<double>(c_.p.conv.group_out()), group_in(), dense());
  }
  double dense_weight() const {
    double part = dense_parts().dense_weight;
    if (dense_on_tensor_cores()) {
      part *= share(group_in(), kHalfOfWeight);
      if (c_.p.conv.group_in() < kWeightTile) part *= kPartialTile;
    }
    return std::max(pass(dense()), macs / (dense_rate() * part) + kLaunchSeconds);
  }

  // One of our convolutions with `numbers` in its result: blocks run in waves, and the last one may be mostly
  // empty.
  double single(const ConvWork& work, double numbers, int64_t channels, double bytes) const {
    const double at_once = kBlocksPerProcessor * static_cast<double>(device_.processors);
    const double waves = std::ceil(static_cast<double>(work.blocks) / at_once);
    const bool few = c_.math_mode == MathMode::tensor_core && channels <= kFewOutputs;
    const double products = work.macs / (own_rate() * own_parts().own * (few ? kFewOutputsPart : 1.0));
    const double finish = clocks(numbers * kFinishClocks) / static_cast<double>(work.blocks);
    return std::max(pass(bytes), waves * at_once * (products + finish) + kLaunchSeconds);
  }
  double single_weight(double bytes) const {
    const bool first = c_.p.conv.in_channels <= kFirstChannels;
    const double unpack = first ? clocks(outputs * kUnpackClocks) : 0.0;
    // And the sum of its parts.
    return macs / (own_rate() * own_parts().own_weight) + unpack + pass(bytes) + kLaunchSeconds;
  }

  double floor(double bytes) const { return std::max(macs / dense_rate(), bytes / device_.bandwidth); }

 private:
  // Where our kernels do without, cuDNN has kernels for 16-bit types that need not.
  bool dense_on_tensor_cores() const { return c_.math_mode == MathMode::tensor_core || is_narrow(); }
  bool is_narrow() const { return c_.dtype == Dtype::float16 || c_.dtype == Dtype::bfloat16; }
  const Parts& parts_on(bool tensor_cores) const {
    if (!tensor_cores) return kFma;
    return is_narrow() ? kNarrow : kTf32;
  }
  const Parts& dense_parts() const { return parts_on(dense_on_tensor_cores()); }
  const Parts& own_parts() const { return parts_on(c_.math_mode == MathMode::tensor_core); }

  double clocks(double count) const {
    return count / (device_.clock * static_cast<double>(device_.processors));
  }
  double rate(double tensor, bool tensor_cores) const {
    const double fma = rates_of(device_).fma * (c_.dtype == Dtype::float64 ? 0.5 : 1.0);
    const double macs = tensor_cores ? std::max(fma, tensor * (is_narrow() ? 1.0 : 0.5)) : fma;
    return macs * device_.clock * static_cast<double>(device_.processors);
  }
  double dense_rate() const { return rate(rates_of(device_).tensor, dense_on_tensor_cores()); }
  double own_rate() const {
    return rate(rates_of(device_).tensor_own, c_.math_mode == MathMode::tensor_core);
  }
  double group_in() const { return static_cast<double>(c_.p.conv.group_in()); }
  double out_channels() const { return static_cast<double>(c_.p.conv.group_out()); }

  // One of PyTorch's, which sums over `summed` channels for each of `written`.
  double convolution(double summed, double written, double bytes) const {
    double part = dense_parts().dense, filled = 1.0;
    if (dense_on_tensor_cores()) {
      filled = std::max(1.0, kLeastChannels / summed);
      part *= share(summed * filled, kHalfSummed) * share(written, kHalfWritten);
    }
    return std::max(pass(bytes), macs * filled / (dense_rate() * part) + kLaunchSeconds);
  }

  const CudaConv& c_;
  const CudaDevice& device_;
};

}  // namespace

bool was_measured(const CudaDevice& device) {
  return device.arch == kMeasured;
}

Costs predict_forward(const CudaConv& c, const CudaDevice& device, bool save_winner_mask) {
  const Problem q(c, device, save_winner_mask);
  const double read = q.input + q.weight, convolution = q.dense_forward();
  const double biased = q.nothing() ? 0 : 2 * q.z, rectified = q.relu() ? 2 * q.z : 0;
  const double pooled = q.pools() ? q.z + q.y + q.index : 0;
  const double after = q.nothing() ? 0 : q.z + q.y + q.winner_mask;
  Costs costs{};
  costs.eager = {
      convolution + q.eager_pass(biased, q.outputs) + q.pass(rectified) + q.eager_pass(pooled, q.outputs),
      read + q.z + biased + rectified + pooled};
  costs.pytorch = {convolution + q.pass(after), read + q.z + after};
  if (const auto work = conv_forward_work(c, device)) {
    const double bytes = read + q.y + q.winner_mask;
    costs.single = {q.single(*work, q.outputs, c.p.conv.out_channels, bytes), bytes};
  }
  return costs;
}

BackwardCosts predict_backward(const CudaConv& c, const CudaDevice& device) {
  const Problem q(c, device, true);
  const double pooled = q.pools() ? 2 * q.z + q.y + q.index : 0, rectified = q.relu() ? 3 * q.z : 0;
  const double expanded = q.pools() ? q.y + q.winner_mask + q.z : rectified;
  const double eager = q.eager_pass(pooled, q.outputs) + q.pass(rectified);
  const double summed = q.nothing() ? 0 : q.gradient(),
               eager_summed = q.nothing() ? 0 : q.z;  // for grad_bias
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const auto work = conv_grad_input_work(c, device);
  const double input = q.dense_input(), weight = q.dense_weight(), own = q.own_gradient();
  return {.seconds = {.expand = q.pass(expanded),
                      .dense_input = input,
                      .own_input = work ? q.single(*work, q.inputs, c.p.conv.in_channels, own) : kNever,
                      .dense_weight = weight + q.pass(summed),
                      .own_weight = conv_grad_weight_fits(c, device) ? q.single_weight(own) : kNever},
          .eager_input = {input + eager / 2, q.dense() + (pooled + rectified) / 2},
          .eager_weight = {weight + q.eager_pass(eager_summed, q.outputs) + eager / 2,
                           q.dense() + eager_summed + (pooled + rectified) / 2},
          .dense_input_bytes = q.dense() + expanded / 2,
          .dense_weight_bytes = q.dense() + summed + expanded / 2,
          .own_bytes = own};
}

double floor_seconds(const CudaConv& c, const CudaDevice& device, bool save_winner_mask) {
  const Problem q(c, device, save_winner_mask);
  return q.floor(q.input + q.weight + q.y + q.winner_mask);
}

}  // namespace dlfast
#endif
