#include "conv_relu_pool/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "conv_relu_pool/plan_cpu_kind.h"

namespace dlfast {
namespace {

// ---- Measured constants: parts of the peak of multiply-adds that the inner loops reach, all else in cache.
// Fitted to times of forward, grad_input and grad_weight by themselves with DLFAST_PLAN forced, AVX2, on the
// shapes of `dlfast bench layers` and some more. Not measured at the other levels.
constexpr double kPyTorchSpeed = 0.85;  // its convolution of float32
constexpr double kPyTorchBackwardSpeed = 0.70;
constexpr double kPyTorchFewChannels = 0.25;  // the same with fewer than kFew input channels
constexpr int64_t kFew = 8;
constexpr double kPyTorch16BitSpeed = 0.15;  // without instructions for them
constexpr double kDirectSpeed = 0.75;
constexpr double kPackFlops = 20.0;           // per weight, to lay it out for the direct way
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

// Half of a usual second-level cache, in floats; the other half is for weights and output.
constexpr double kUnitFloats = 64 * 1024;
// About a first-level cache.
constexpr double kStreamedFloats = 8 * 1024;
constexpr int64_t kUnitsPerThread = 4;

constexpr std::string_view kForced[] = {"direct", "masked", "winograd2", "winograd4", "epilogue", "single"};

// DLFAST_PLAN=direct, winograd2 or winograd4 takes our kernels wherever they accept the problem, even where
// they are slower, forward in the way named and backward the sparse way; DLFAST_PLAN=masked is direct with
// grad_weight the masked way where that accepts it; DLFAST_PLAN=single does the same on CUDA;
// DLFAST_PLAN=epilogue never takes them. What is for the other device leaves this one its own choice.
std::string_view forced_plan() {
  const char* asked = std::getenv("DLFAST_PLAN");
  const std::string_view plan = asked == nullptr ? "" : asked;
  if (plan != "" && std::find(std::begin(kForced), std::end(kForced), plan) == std::end(kForced)) {
    throw std::invalid_argument(
        "DLFAST_PLAN must be direct, masked, winograd2, winograd4, epilogue or single, got " +
        std::string(plan));
  }
  return plan;
}

// Nothing but PyTorch's way where there are no tensors to compute on, and CUDA's own planner for CUDA.
std::optional<Choice> planned_elsewhere([[maybe_unused]] const ConvBlockParams& p, const PlanContext& context,
                                        [[maybe_unused]] Part part) {
#ifdef DLFAST_WITH_CUDA
  if (context.device != nullptr) return plan_cuda(p, context, part, forced_plan());
#endif
  if (context.cpu) return std::nullopt;
  Choice choice{};
  choice.candidates[choice.count++] = {Path::pytorch, convolution_flops(p.conv), 0.0};
  return choice;
}

// What was asked for of the CPU's ways.
std::string_view forced_cpu_plan() {
  const std::string_view plan = forced_plan();
  return plan == "single" ? "" : plan;
}

double round_up(double n, double multiple) {
  return static_cast<double>((static_cast<int64_t>(n) + static_cast<int64_t>(multiple) - 1) /
                             static_cast<int64_t>(multiple)) *
         multiple;
}

// What the costs are made of: the CPU, and sizes in elements.
struct Sizes {
  CpuKind cpu = planned_cpu();
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
        element(dtype == Dtype::float64   ? 8.0
                : dtype == Dtype::float32 ? 4.0
                                          : 2.0),
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
  explicit Candidates(const PlanContext& context) : context_(context) {}
  void add(Path path, double flops, double bytes) {
    choice_.candidates[choice_.count] = {path, flops, bytes};
    if (time(choice_.count) < time(choice_.best)) choice_.best = choice_.count;
    ++choice_.count;
  }
  void force(Path path) {
    for (int i = 0; i < choice_.count; ++i) {
      if (choice_.candidates[i].path == path) choice_.best = i;
    }
  }
  bool has(Path path) const {
    return std::any_of(choice_.candidates.begin(), choice_.candidates.begin() + choice_.count,
                       [&](const Candidate& c) { return c.path == path; });
  }
  Choice choice() const { return choice_; }

 private:
  double time(int index) const {
    const Candidate& c = choice_.candidates[index];
    return c.flops + c.bytes * kFlopsPerByte * static_cast<double>(context_.threads);
  }
  const PlanContext& context_;
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

bool accepts_forward(ConvBlockParams p, int64_t winograd, const PlanContext& context) {
  p.winograd = winograd;
  return forward_fits(p, context.dtype, context.save_code);
}

// A convolution with nothing after it: only fewer multiplications can be faster than PyTorch's.
bool is_alone(const ConvBlockParams& p) {
  return p.pool.pool == Pool::none && p.pool.activation == Activation::none;
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
double depthwise_gain(const ConvBlockParams& p, const PlanContext& context, Part part) {
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

// PyTorch's way is the first of `ways`.
void add_depthwise(Candidates& ways, const ConvBlockParams& p, const PlanContext& context, Part part,
                   std::string_view forced) {
  if (!depthwise_fits(p, context.dtype)) return;
  const double gain = depthwise_gain(p, context, part);
  if (gain == 0.0 && forced == "") return;
  const Candidate pytorch = ways.choice().candidates[0];
  const double factor = gain == 0.0 ? 1.0 : 1.0 / gain;
  ways.add(Path::depthwise, pytorch.flops * factor, pytorch.bytes * factor);
}

// What grad_weight and grad_input have in common; PyTorch's way is among `ways` already.
struct Backward {
  std::string_view forced = forced_cpu_plan();
  Sizes s;
  double threads, own_bytes, live, listing;
  Candidates ways;

  Backward(const ConvBlockParams& p, const PlanContext& context)
      : s(p, context.dtype), threads(static_cast<double>(context.threads)), ways(context) {
    own_bytes = (s.input + s.weight + s.y) * s.element + (p.pool.pool == Pool::max ? s.y : 0.0);
    live = relu_only(p) ? kReluDensity * s.y : s.y;
    listing = kListFlops * s.y / s.cpu.level_speed() + kOwnCall * threads;
    ways.add(Path::pytorch,
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
    return forced == "epilogue" || (forced == "" && p.pool.pool == Pool::none && !p.pool.channels_last &&
                                    s.cpu.products_of_16_bits(dtype) > 0.0);
  }
  bool worth_it() const { return dlfast::worth_it(s, forced); }
  bool worth_listing(const ConvBlockParams& p) const { return worth_it() && (!is_alone(p) || forced != ""); }
  void add_sparse(double speed) {
    const double products = 2.0 * live * s.taps * round_up(s.in, s.lanes);
    ways.add(Path::sparse, products / (speed * s.cpu.level_speed()) + listing, own_bytes);
  }
};

}  // namespace

bool cuda_plan_is_forced() {
  const std::string_view plan = forced_plan();
  return plan == "single" || plan == "epilogue";
}

const char* path_name(Path path) {
  constexpr const char* names[] = {"eager",  "pytorch", "direct", "winograd2", "winograd4",
                                   "sparse", "rows",    "masked", "depthwise", "single"};
  return names[static_cast<int>(path)];
}

double convolution_flops(const ConvParams& conv) {
  return 2.0 * static_cast<double>(conv.batch) * conv.out_channels * conv.output_size[0] *
         conv.output_size[1] * conv.group_in() * conv.positions();
}

Choice plan_forward(const ConvBlockParams& p, const PlanContext& context) {
  if (const auto choice = planned_elsewhere(p, context, Part::forward)) return *choice;
  const std::string_view forced = forced_cpu_plan();
  const Sizes s(p, context.dtype);
  const double threads = static_cast<double>(context.threads), flops = convolution_flops(p.conv);
  const double code = context.save_code && p.pool.pool == Pool::max ? s.y : 0.0;
  const double own_bytes = (s.input + s.weight + s.y) * s.element + code;
  // After the convolution: ReLU alone reads and writes z once more than a pass that pools.
  const double passes = is_alone(p) ? 0.0 : p.pool.pool == Pool::none ? 2.0 : 1.0;
  Candidates ways(context);
  ways.add(Path::pytorch,
           flops / pytorch_speed(s.cpu, p, context.dtype, kPyTorchSpeed) + 2 * kPyTorchCall * threads,
           own_bytes + passes * 2 * s.z * s.element);
  if (forced == "epilogue") return ways.choice();
  add_depthwise(ways, p, context, Part::forward, forced);
  if (!worth_it(s, forced)) return ways.choice();
  if ((!is_alone(p) || forced != "") && accepts_forward(p, 0, context)) {
    const double used = s.out / round_up(s.out, s.lanes);
    ways.add(Path::direct,
             flops / (kDirectSpeed * used * s.cpu.level_speed()) + s.weight * kPackFlops + kOwnCall * threads,
             own_bytes);
  }
  for (const int64_t m : {2, 4}) {
    if (!accepts_forward(p, m, context) || !worth_tiles(s, p.conv.output_size, forced)) continue;
    ways.add(m == 2 ? Path::winograd2 : Path::winograd4,
             winograd_flops(s, static_cast<double>(p.conv.batch), covered(p.pool, 0), covered(p.pool, 1),
                            s.in, s.out, m) +
                 kOwnCall * threads,
             own_bytes);
  }
  if (forced != "") ways.force(Path::direct);
  if (forced == "direct" || forced == "masked") ways.force(Path::depthwise);
  if (forced == "winograd2") ways.force(Path::winograd2);
  if (forced == "winograd4") ways.force(Path::winograd4);
  return ways.choice();
}

Choice plan_grad_weight(const ConvBlockParams& p, const PlanContext& context) {
  if (const auto choice = planned_elsewhere(p, context, Part::grad_weight)) return *choice;
  Backward b(p, context);
  const Sizes& s = b.s;
  if (b.leave_to_pytorch(p, context.dtype)) return b.ways.choice();
  const CpuKernels& kernels = cpu_kernels();
  add_depthwise(b.ways, p, context, Part::grad_weight, b.forced);
  const auto fits = [&](GradWeightWay way) { return grad_weight_fits(p, way, context.dtype, kernels); };
  if (b.worth_listing(p) && fits(GradWeightWay::channels)) b.add_sparse(kSparseSpeed);
  if (b.worth_listing(p) && fits(GradWeightWay::rows)) {
    const double together = p.conv.dilation[1] == 1 ? static_cast<double>(p.conv.kernel[1]) : 1.0;
    const double products = 2.0 * b.live * s.taps / together * round_up(together * s.in, s.lanes);
    b.ways.add(Path::rows, products / (kSparseSpeed * s.cpu.level_speed()) + b.listing, b.own_bytes);
  }
  if (b.worth_it() && fits(GradWeightWay::masked)) {
    const double positions = static_cast<double>(p.pool.window_positions());
    const double products =
        2.0 * s.y / s.out * round_up(s.out, s.lanes) * (s.taps * s.in * positions + kMaskedExtra);
    b.ways.add(Path::masked, products / (kMaskedSpeed * s.cpu.level_speed()) + kOwnCall * b.threads,
               b.own_bytes);
  }
  if (worth_tiles(s, p.conv.output_size, b.forced) && p.pool.pool == Pool::none &&
      accepts_forward(p, 4, context)) {
    const double elements = 36.0 / 16.0 * round_up(static_cast<double>(p.conv.output_size[0]), 4) *
                            round_up(static_cast<double>(p.conv.output_size[1]), 4) *
                            static_cast<double>(p.conv.batch) * s.groups;
    const double sums = 36.0 * s.groups * s.in * s.out;
    // Fewer channels than lanes are transformed one by one.
    const auto transformed = [&](double channels) {
      return channels < s.lanes ? channels * s.lanes : channels;
    };
    b.ways.add(Path::winograd4,
               2.0 * elements * s.in * s.out / kWeightProductSpeed +
                   (elements * (transformed(s.in) + transformed(s.out)) + 2 * sums) * kTransformFlops /
                       s.cpu.level_speed() +
                   2 * kPyTorchCall * b.threads,
               b.own_bytes + 2.0 * 4.0 * (elements * (s.in + s.out) + sums));
  }
  const bool tiles = b.forced == "winograd4" && b.ways.has(Path::winograd4);
  if (b.forced != "") {
    b.ways.force(tiles ? Path::winograd4 : b.ways.has(Path::rows) ? Path::rows : Path::sparse);
  }
  if (b.forced == "direct" || b.forced == "masked") b.ways.force(Path::depthwise);
  if (b.forced == "masked") b.ways.force(Path::masked);
  return b.ways.choice();
}

Choice plan_grad_input(const ConvBlockParams& p, const PlanContext& context) {
  if (const auto choice = planned_elsewhere(p, context, Part::grad_input)) return *choice;
  Backward b(p, context);
  const Sizes& s = b.s;
  if (b.leave_to_pytorch(p, context.dtype)) return b.ways.choice();
  add_depthwise(b.ways, p, context, Part::grad_input, b.forced);
  if (b.worth_listing(p) && grad_input_fits(p, context.dtype)) b.add_sparse(kScatterSpeed);
  if (worth_tiles(s, p.conv.input_size, b.forced) && p.pool.pool == Pool::none &&
      accepts_forward(p, 4, context) && p.conv.padding[0] <= 2 && p.conv.padding[1] <= 2) {
    const double batch = static_cast<double>(p.conv.batch);
    b.ways.add(Path::winograd4,
               winograd_flops(s, batch, static_cast<double>(p.conv.input_size[0]),
                              static_cast<double>(p.conv.input_size[1]), s.out, s.in, 4) +
                   2 * kOwnCall * b.threads,
               b.own_bytes + (Backward::relu_only(p) ? 2 * s.z * s.element : 0.0));
  }
  const bool tiles = b.forced == "winograd4" && b.ways.has(Path::winograd4);
  if (b.forced != "") b.ways.force(tiles ? Path::winograd4 : Path::sparse);
  if (b.forced == "direct" || b.forced == "masked") b.ways.force(Path::depthwise);
  return b.ways.choice();
}

namespace {

// Pooled rows of which the convolution rows, each of so many floats, make `floats`; at least one.
int64_t rows_within(const ConvBlockParams& p, double floats, double per_conv_row) {
  const double rows = floats / (per_conv_row * static_cast<double>(p.pool.window.stride[0]));
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(rows, 1e9)));
}

int64_t rows_for_balance(const ConvBlockParams& p, int64_t units) {
  return std::max<int64_t>(1, p.conv.batch * p.pool.output_size[0] / units);
}

}  // namespace

int64_t plan_grain(const ConvBlockParams& p, double floats_per_conv_row, int64_t threads) {
  const int64_t grain = std::min(rows_within(p, kUnitFloats, floats_per_conv_row),
                                 rows_for_balance(p, kUnitsPerThread * threads));
  // Whole tiles: a part of one costs as much.
  const int64_t stride = p.pool.window.stride[0];
  const int64_t rows = p.tile() % stride == 0 ? p.tile() / stride : p.tile();
  return (grain + rows - 1) / rows * rows;
}

int64_t grad_weight_grain(const ConvBlockParams& p, GradWeightWay way, int64_t threads) {
  const int64_t pooled = std::min(p.pool.output_size[1], kGradWeightCols);
  const double cols = static_cast<double>(
      std::min((pooled - 1) * p.pool.window.stride[1] + p.pool.window.size[1], p.pool.input_size[1]));
  const double row = padded_length(p.conv, 1, cols) * p.conv.stride[0], channels = p.conv.group_in();
  // What the taps stream over: all channels, or a register of them.
  const double streamed = way == GradWeightWay::channels ? cpu_kernels().lanes : channels;
  const double near = way == GradWeightWay::channels ? kStreamedFloats : kStreamedFloats / 2;
  // The rows of the first position under a kernel, and what its lists take, come before all others.
  const double all = channels + static_cast<double>(cpu_kernels().lanes);
  const double first = padded_length(p.conv, 0, 1.0) * padded_length(p.conv, 1, cols) * all;
  return std::min({rows_within(p, near, row * streamed),
                   rows_within(p, kMostScratchFloats - first,
                               row * all + 2.0 * cols * static_cast<double>(p.conv.group_out())),
                   rows_for_balance(p, kUnitsPerThread * threads)});
}

int64_t grad_input_grain(const ConvBlockParams& p, int64_t threads) {
  // Rows that reach into a neighbour's are listed by both; of eight few do.
  constexpr int64_t kRows = 8;
  int64_t rows = std::min(kRows, rows_for_balance(p, 2 * threads));
  const double step = static_cast<double>(p.pool.window.stride[0]) * p.conv.stride[0];
  while (rows > 1 && grad_input_floats(p, static_cast<double>(rows) * step) > kMostScratchFloats) --rows;
  return rows;
}

}  // namespace dlfast
