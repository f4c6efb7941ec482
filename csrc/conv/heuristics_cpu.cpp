#include "conv/heuristics.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "conv/cpu/kernels.h"
#include "conv/cpu_kind.h"

namespace dlfast {
namespace {

// ---- Measured constants: parts of the peak of multiply-adds that the inner loops reach, all else in cache.
// Fitted to times of forward, grad_input and grad_weight by themselves with DLFAST_ALGORITHM forced, AVX2, on
// the shapes of `dlfast bench layers` and some more. Not measured at the other levels.
constexpr double kPyTorchSpeed = 0.85;  // its convolution of float32
constexpr double kPyTorchBackwardSpeed = 0.70;
constexpr double kPyTorchFewChannels = 0.25;  // the same with fewer than kFew input channels
constexpr int64_t kFew = 8;
constexpr double kPyTorch16BitSpeed = 0.15;  // without instructions for them
constexpr double kDirectSpeed = 0.75;
constexpr double kPackFlops = 20.0;           // per weight, to lay it out for the direct kernel
constexpr double kWinogradSpeed = 0.62;       // of its matrix products
constexpr double kWinogradPackFlops = 75.0;   // per element of a transformed weight
constexpr double kTransformFlops = 24.0;      // per element of a transformed tile, in or out
constexpr double kWeightProductSpeed = 0.75;  // of PyTorch's matrix products between transformed tiles
constexpr double kSparseSpeed = 0.55;         // of grad_weight
constexpr double kScatterSpeed = 0.46;        // of grad_input
constexpr double kListFlops = 300.0;          // per position of the pooled gradient, to list it
constexpr double kMaskedSpeed = 0.60;
constexpr double kMaskedExtra = 8.0;  // products, as it were, that a pooled gradient costs before the first

constexpr double kFlopsPerByte = 5.0;  // of one thread, in the time one byte takes to or from memory

// Calls of one thread, in flops: a pass or a convolution of PyTorch, and one of ours.
constexpr double kPyTorchCall = 4e5;
constexpr double kOwnCall = 4e5;

// Winners among the positions of a ReLU without pooling; with pooling about all windows have one.
constexpr double kReluDensity = 0.5;

// What was asked for of the CPU's algorithms.
std::string_view forced_on_cpu() {
  const std::string_view forced = forced_algorithm();
  return forced == "single" ? "" : forced;
}

double round_up(double n, double multiple) {
  return static_cast<double>((static_cast<int64_t>(n) + static_cast<int64_t>(multiple) - 1) /
                             static_cast<int64_t>(multiple)) *
         multiple;
}

// What the costs are made of: the CPU, and sizes in elements.
struct Sizes {
  CpuKind cpu = assumed_cpu();
  double input, weight, z, y;
  double element;  // bytes
  double lanes;
  double in, out, groups, taps;  // of one group

  Sizes(const ConvBlockParams& p, Dtype dtype)
      : input(static_cast<double>(p.conv.batch) * p.conv.in_channels * p.conv.input_size[0] *
              p.conv.input_size[1]),
        weight(static_cast<double>(p.conv.out_channels) * p.conv.group_in() * p.conv.positions()),
        z(static_cast<double>(p.pool.input_numel())),
        y(static_cast<double>(p.pool.output_numel())),
        element(static_cast<double>(element_bytes(dtype))),
        lanes(static_cast<double>(cpu.lanes())),
        in(static_cast<double>(p.conv.group_in())),
        out(static_cast<double>(p.conv.group_out())),
        groups(static_cast<double>(p.conv.groups)),
        taps(static_cast<double>(p.conv.positions())) {}
};

double pytorch_speed(const CpuKind& cpu, const ConvBlockParams& p, Dtype dtype, double usual) {
  const double few = p.conv.group_in() < kFew ? kPyTorchFewChannels : usual;
  if (dtype == Dtype::bfloat16 || dtype == Dtype::float16) {
    const double native = cpu.products_of_16_bits(dtype);
    return native > 0 ? few * native : kPyTorch16BitSpeed;
  }
  return dtype == Dtype::float64 ? few / 2 : few;
}

class Candidates {
 public:
  explicit Candidates(const Context& context) : context_(context) {}

  // `flops` take as long as the arithmetic does, at the full speed of the machine.
  void add(Algorithm algorithm, double flops, double bytes) {
    const double all = flops + bytes * kFlopsPerByte * static_cast<double>(context_.threads);
    add_slower({algorithm, all / context_.flops, bytes}, 1.0);
  }
  // What takes `factor` times as long as `like`, and moves as many times the bytes.
  void add_slower(Candidate like, double factor) {
    like.seconds *= factor;
    like.bytes *= factor;
    choice_.candidates[choice_.count] = like;
    if (like.seconds < choice_.seconds()) choice_.best = choice_.count;
    ++choice_.count;
  }
  void force(Algorithm algorithm) {
    for (int i = 0; i < choice_.count; ++i) {
      if (choice_.candidates[i].algorithm == algorithm) choice_.best = i;
    }
  }
  bool has(Algorithm algorithm) const {
    return std::any_of(choice_.candidates.begin(), choice_.candidates.begin() + choice_.count,
                       [&](const Candidate& c) { return c.algorithm == algorithm; });
  }
  const Candidate& pytorch() const { return choice_.candidates[0]; }
  Choice choice(std::string_view forced) const {
    Choice found = choice_;
    found.reason = reason_of(found, forced);
    return found;
  }

 private:
  const Context& context_;
  Choice choice_{};
};

// How often Winograd's tiles are transformed: once for all weights that stay in the cache together.
double winograd_rounds(const Sizes& s, double in, double out, double side) {
  if (s.groups > 1) return 1.0;
  return std::ceil(side * side * in * out / static_cast<double>(kWinogradWeights));
}

// Positions of the convolution output, along an axis, that some window covers: only these are computed.
double covered(const ReluPoolParams& pool, int axis) {
  const int64_t reach = (pool.output_size[axis] - 1) * pool.window.stride[axis] + pool.window.size[axis];
  return static_cast<double>(std::min(reach - pool.window.padding[axis], pool.input_size[axis]));
}

// Winograd's cost for `batch` images of `rows` x `cols` outputs.
double winograd_flops(const Sizes& s, double batch, double rows, double cols, double in, double out,
                      int64_t m) {
  const double side = static_cast<double>(m) + 2;
  const double tiles = batch * s.groups * round_up(rows, m) * round_up(cols, m) / static_cast<double>(m * m);
  const double products = 2.0 * tiles * side * side * in * round_up(out, s.lanes);
  const double inputs = in * winograd_rounds(s, in, out, side);
  const double transforms = tiles * side * side * (inputs + out) * kTransformFlops;
  const double weights = s.groups * side * side * in * out * kWinogradPackFlops;
  return (products / kWinogradSpeed + transforms + weights) / s.cpu.level_speed();
}

// With nothing after it: only fewer multiplications can be faster than PyTorch's.
bool is_alone(const ConvBlockParams& p) {
  return p.pool.is_nothing();
}

// Lists and packing per group: with few channels in each they cost more than they save.
bool worth_it(const Sizes& s, std::string_view forced) {
  return s.groups == 1 || s.in >= s.lanes || forced != "";
}

// The same for Winograd's method: each group of each image has transforms of its own, which few channels or a
// few tiles do not pay for.
bool worth_tiles(const Sizes& s, const int64_t (&size)[2], std::string_view forced) {
  constexpr double kLeastWork = 500.0;  // channels times tiles of 4x4
  const double tiles =
      round_up(static_cast<double>(size[0]), 4) * round_up(static_cast<double>(size[1]), 4) / 16;
  return worth_it(s, forced) && (s.groups == 1 || forced != "" || s.in * tiles >= kLeastWork);
}

// How many times faster our depthwise kernels are than PyTorch's where that was measured, or 0 where
// PyTorch's win or nobody looked. Fitted to the layers of MobileNetV3 at batches of 1 and 32 (AVX2, float32,
// one thread and two). PyTorch's forward and grad_input are as fast as memory allows once the tensors leave
// the caches, so that ours win by what they save: the pass of ReLU, and the start of a call where it is
// short.
double depthwise_gain(const ConvBlockParams& p, const Context& context, Part part) {
  const ConvParams& c = p.conv;
  const Sizes s(p, context.dtype);
  constexpr int64_t kDepthwiseChannels = 32;
  const bool known_kernel = c.kernel[0] == c.kernel[1] && (c.kernel[0] == 3 || c.kernel[0] == 5);
  if (context.dtype != Dtype::float32 || s.cpu.level_speed() < 1.0 || !known_kernel ||
      c.in_channels < kDepthwiseChannels || c.dilation[0] != 1 || c.dilation[1] != 1) {
    return 0.0;
  }
  const bool channels_last = p.pool.channels_last && p.input_strides[1] == 1;
  const bool large = c.kernel[0] == 5, dense = c.stride[0] == 1 && c.stride[1] == 1;
  const double bytes = (s.input + s.z) * s.element;
  if (part == Part::grad_weight) {
    if (large) return 2.5;
    return channels_last && (dense || bytes <= 8e6) ? 1.2 : 0.0;
  }
  if (!channels_last) return 0.0;
  if (part == Part::grad_input) return dense || large || bytes <= 8e6 ? 1.1 : 0.0;
  if (!is_alone(p)) return dense || bytes <= 8e6 ? 1.15 : 0.0;
  return bytes <= (dense ? 28e6 : 2e6) ? 1.05 : 0.0;
}

void add_depthwise(Candidates& candidates, const ConvBlockParams& p, const Context& context, Part part,
                   std::string_view forced) {
  if (!takes_on_cpu(p, context, part, Algorithm::depthwise)) return;
  const double gain = depthwise_gain(p, context, part);
  if (gain == 0.0 && forced == "") return;
  Candidate own = candidates.pytorch();
  own.algorithm = Algorithm::depthwise;
  candidates.add_slower(own, gain == 0.0 ? 1.0 : 1.0 / gain);
}

// What grad_weight and grad_input have in common; PyTorch's kernels are among the candidates already.
struct Backward {
  std::string_view forced = forced_on_cpu();
  Sizes s;
  double threads, own_bytes, live, listing;
  Candidates candidates;

  Backward(const ConvBlockParams& p, const Context& context)
      : s(p, context.dtype), threads(static_cast<double>(context.threads)), candidates(context) {
    own_bytes = (s.input + s.weight + s.y) * s.element + (p.pool.pool == Pool::max ? s.y : 0.0);
    live = relu_only(p) ? kReluDensity * s.y : s.y;
    listing = kListFlops * s.y / s.cpu.level_speed() + kOwnCall * threads;
    candidates.add(Algorithm::pytorch,
                   convolution_flops(p.conv) / pytorch_speed(s.cpu, p, context.dtype, kPyTorchBackwardSpeed) +
                       2 * kPyTorchCall * threads,
                   own_bytes + (is_alone(p) ? 0.0 : 2 * s.z * s.element));
  }

  static bool relu_only(const ConvBlockParams& p) {
    return p.pool.pool == Pool::none && p.pool.activation == Activation::relu;
  }
  // To lay a contiguous gradient out anew goes number by number in 16 bits: where nothing is pooled that
  // takes longer than Winograd's method saves if the CPU multiplies 16 bits itself (1.3 to 5 times as long,
  // Zen 4).
  bool leave_to_pytorch(const ConvBlockParams& p, Dtype dtype) const {
    return forced == "pytorch" || (forced == "" && p.pool.pool == Pool::none && !p.pool.channels_last &&
                                   s.cpu.products_of_16_bits(dtype) > 0.0);
  }
  bool worth_it() const { return dlfast::worth_it(s, forced); }
  bool worth_listing(const ConvBlockParams& p) const { return worth_it() && (!is_alone(p) || forced != ""); }
  void add_sparse(double speed) {
    const double products = 2.0 * live * s.taps * round_up(s.in, s.lanes);
    candidates.add(Algorithm::sparse, products / (speed * s.cpu.level_speed()) + listing, own_bytes);
  }
};

Choice choose_forward(const ConvBlockParams& p, const Context& context) {
  const std::string_view forced = forced_on_cpu();
  const Sizes s(p, context.dtype);
  const double threads = static_cast<double>(context.threads), flops = convolution_flops(p.conv);
  const double winner_mask = context.save_winner_mask && p.pool.pool == Pool::max ? s.y : 0.0;
  const double own_bytes = (s.input + s.weight + s.y) * s.element + winner_mask;
  // After the convolution: ReLU alone reads and writes z once more than a pass that pools.
  const double passes = is_alone(p) ? 0.0 : p.pool.pool == Pool::none ? 2.0 : 1.0;
  Candidates candidates(context);
  candidates.add(Algorithm::pytorch,
                 flops / pytorch_speed(s.cpu, p, context.dtype, kPyTorchSpeed) + 2 * kPyTorchCall * threads,
                 own_bytes + passes * 2 * s.z * s.element);
  if (forced == "pytorch") return candidates.choice(forced);
  add_depthwise(candidates, p, context, Part::forward, forced);
  if (!worth_it(s, forced)) return candidates.choice(forced);
  const auto takes = [&](Algorithm algorithm) { return takes_on_cpu(p, context, Part::forward, algorithm); };
  if ((!is_alone(p) || forced != "") && takes(Algorithm::direct)) {
    const double used = s.out / round_up(s.out, s.lanes);
    candidates.add(
        Algorithm::direct,
        flops / (kDirectSpeed * used * s.cpu.level_speed()) + s.weight * kPackFlops + kOwnCall * threads,
        own_bytes);
  }
  for (const int64_t m : {2, 4}) {
    const Algorithm algorithm = m == 2 ? Algorithm::winograd2 : Algorithm::winograd4;
    if (!takes(algorithm) || !worth_tiles(s, p.conv.output_size, forced)) continue;
    candidates.add(algorithm,
                   winograd_flops(s, static_cast<double>(p.conv.batch), covered(p.pool, 0),
                                  covered(p.pool, 1), s.in, s.out, m) +
                       kOwnCall * threads,
                   own_bytes);
  }
  if (forced != "") candidates.force(Algorithm::direct);
  if (forced == "direct" || forced == "masked") candidates.force(Algorithm::depthwise);
  if (forced == "winograd2") candidates.force(Algorithm::winograd2);
  if (forced == "winograd4") candidates.force(Algorithm::winograd4);
  return candidates.choice(forced);
}

Choice choose_grad_weight(const ConvBlockParams& p, const Context& context) {
  Backward b(p, context);
  const Sizes& s = b.s;
  if (b.leave_to_pytorch(p, context.dtype)) return b.candidates.choice(b.forced);
  add_depthwise(b.candidates, p, context, Part::grad_weight, b.forced);
  const auto takes = [&](Algorithm algorithm) {
    return takes_on_cpu(p, context, Part::grad_weight, algorithm);
  };
  if (b.worth_listing(p) && takes(Algorithm::sparse)) b.add_sparse(kSparseSpeed);
  if (b.worth_listing(p) && takes(Algorithm::rows)) {
    const double together = p.conv.dilation[1] == 1 ? static_cast<double>(p.conv.kernel[1]) : 1.0;
    const double products = 2.0 * b.live * s.taps / together * round_up(together * s.in, s.lanes);
    b.candidates.add(Algorithm::rows, products / (kSparseSpeed * s.cpu.level_speed()) + b.listing,
                     b.own_bytes);
  }
  if (b.worth_it() && takes(Algorithm::masked)) {
    const double positions = static_cast<double>(p.pool.window_positions());
    const double products =
        2.0 * s.y / s.out * round_up(s.out, s.lanes) * (s.taps * s.in * positions + kMaskedExtra);
    b.candidates.add(Algorithm::masked,
                     products / (kMaskedSpeed * s.cpu.level_speed()) + kOwnCall * b.threads, b.own_bytes);
  }
  if (worth_tiles(s, p.conv.output_size, b.forced) && takes(Algorithm::winograd4)) {
    const double elements = 36.0 / 16.0 * round_up(static_cast<double>(p.conv.output_size[0]), 4) *
                            round_up(static_cast<double>(p.conv.output_size[1]), 4) *
                            static_cast<double>(p.conv.batch) * s.groups;
    const double sums = 36.0 * s.groups * s.in * s.out;
    // Fewer channels than lanes are transformed one by one.
    const auto transformed = [&](double channels) {
      return channels < s.lanes ? channels * s.lanes : channels;
    };
    b.candidates.add(Algorithm::winograd4,
                     2.0 * elements * s.in * s.out / kWeightProductSpeed +
                         (elements * (transformed(s.in) + transformed(s.out)) + 2 * sums) * kTransformFlops /
                             s.cpu.level_speed() +
                         2 * kPyTorchCall * b.threads,
                     b.own_bytes + 2.0 * 4.0 * (elements * (s.in + s.out) + sums));
  }
  const bool tiles = b.forced == "winograd4" && b.candidates.has(Algorithm::winograd4);
  if (b.forced != "") {
    b.candidates.force(tiles                               ? Algorithm::winograd4
                       : b.candidates.has(Algorithm::rows) ? Algorithm::rows
                                                           : Algorithm::sparse);
  }
  if (b.forced == "direct" || b.forced == "masked") b.candidates.force(Algorithm::depthwise);
  if (b.forced == "masked") b.candidates.force(Algorithm::masked);
  return b.candidates.choice(b.forced);
}

Choice choose_grad_input(const ConvBlockParams& p, const Context& context) {
  Backward b(p, context);
  const Sizes& s = b.s;
  if (b.leave_to_pytorch(p, context.dtype)) return b.candidates.choice(b.forced);
  const auto takes = [&](Algorithm algorithm) {
    return takes_on_cpu(p, context, Part::grad_input, algorithm);
  };
  add_depthwise(b.candidates, p, context, Part::grad_input, b.forced);
  if (b.worth_listing(p) && takes(Algorithm::sparse)) b.add_sparse(kScatterSpeed);
  if (worth_tiles(s, p.conv.input_size, b.forced) && takes(Algorithm::winograd4)) {
    const double batch = static_cast<double>(p.conv.batch);
    b.candidates.add(Algorithm::winograd4,
                     winograd_flops(s, batch, static_cast<double>(p.conv.input_size[0]),
                                    static_cast<double>(p.conv.input_size[1]), s.out, s.in, 4) +
                         2 * kOwnCall * b.threads,
                     b.own_bytes + (Backward::relu_only(p) ? 2 * s.z * s.element : 0.0));
  }
  const bool tiles = b.forced == "winograd4" && b.candidates.has(Algorithm::winograd4);
  if (b.forced != "") b.candidates.force(tiles ? Algorithm::winograd4 : Algorithm::sparse);
  if (b.forced == "direct" || b.forced == "masked") b.candidates.force(Algorithm::depthwise);
  return b.candidates.choice(b.forced);
}

}  // namespace

bool takes_on_cpu(const ConvBlockParams& p, const Context& context, Part part, Algorithm algorithm) {
  const Dtype dtype = context.dtype;
  const auto forward = [&](int64_t winograd, bool save_winner_mask) {
    ConvBlockParams q = p;
    q.winograd = winograd;
    return forward_fits(q, dtype, save_winner_mask);
  };
  const auto grad_weight = [&](GradWeightKernel kernel) {
    return part == Part::grad_weight && grad_weight_fits(p, kernel, dtype, conv_cpu());
  };
  switch (algorithm) {
    case Algorithm::pytorch:
      return true;
    case Algorithm::direct:
      return part == Part::forward && forward(0, context.save_winner_mask);
    case Algorithm::winograd2:
      return part == Part::forward && forward(2, context.save_winner_mask);
    case Algorithm::winograd4:
      if (part == Part::forward) return forward(4, context.save_winner_mask);
      return p.pool.pool == Pool::none && forward(4, true) &&
             (part == Part::grad_weight || (p.conv.padding[0] <= 2 && p.conv.padding[1] <= 2));
    case Algorithm::sparse:
      return part == Part::grad_input ? grad_input_fits(p, dtype) : grad_weight(GradWeightKernel::channels);
    case Algorithm::rows:
      return grad_weight(GradWeightKernel::rows);
    case Algorithm::masked:
      return grad_weight(GradWeightKernel::masked);
    case Algorithm::depthwise:
      return depthwise_fits(p, dtype);
    case Algorithm::eager:
    case Algorithm::single:
      break;
  }
  return false;
}

Choice choose_cpu(const ConvBlockParams& p, const Context& context, Part part) {
  switch (part) {
    case Part::forward:
      return choose_forward(p, context);
    case Part::grad_input:
      return choose_grad_input(p, context);
    case Part::grad_weight:
      break;
  }
  return choose_grad_weight(p, context);
}

}  // namespace dlfast
