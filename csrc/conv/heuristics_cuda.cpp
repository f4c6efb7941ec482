// The choice on CUDA, by what predict_cuda.h says or, with torch.backends.cudnn.benchmark, by measurements.
#include "conv/heuristics.h"

#ifdef DLFAST_WITH_CUDA
#include <ATen/Context.h>

#include <algorithm>
#include <cmath>

#include "conv/measure_cuda.h"
#include "conv/predict_cuda.h"

namespace dlfast {
namespace {

// On a GPU that nobody measured a kernel of ours has to be predicted to be so much faster than PyTorch's.
constexpr double kClearlyFaster = 0.8;

class Candidates {
 public:
  explicit Candidates(double least) : least_(least) {}

  void add(Algorithm algorithm, Cost cost) {
    Candidate& c = choice_.candidates[choice_.count++];
    c = {.algorithm = algorithm, .seconds = cost.seconds, .bytes = cost.bytes};
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
        add(c.algorithm, {c.algorithm == Algorithm::pytorch ? pytorch : single, c.bytes});
    }
  }

  // Among the algorithms of the operator: PyTorch's kernels one by one are for its caller to run.
  Choice choose(std::string_view forced) {
    const int pytorch = find(Algorithm::pytorch), single = find(Algorithm::single);
    choice_.best = pytorch;
    if (single >= 0 && forced != "pytorch") {
      const double limit = choice_.candidates[pytorch].seconds * (measured_ ? 1.0 : least_);
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
  const double least_;  // of PyTorch's seconds, below which a prediction for ours is believed
  Choice choice_{};
  bool measured_ = false;
};

void add_forward(const Costs& costs, Candidates& candidates) {
  candidates.add(Algorithm::eager, costs.eager);
  candidates.add(Algorithm::pytorch, costs.pytorch);
  if (costs.single) candidates.add(Algorithm::single, *costs.single);
}

struct OfPart {
  double dense, own;
};

// What each algorithm of one gradient costs beside the fastest of the other. Both dense ones share an
// expansion, which counts with grad_input where that one is dense; so the chosen parts add up to the whole.
OfPart seconds_of_part(const BackwardSeconds& s, Mask mask, Part part) {
  if (!mask[0] || !mask[1]) {
    if (part == Part::grad_input) return {s.dense_input + s.expand, s.own_input};
    return {s.dense_weight + s.expand, s.own_weight};
  }
  const auto cost = [&](bool dense_input, bool dense_weight) {
    return (dense_input ? s.dense_input : s.own_input) + (dense_weight ? s.dense_weight : s.own_weight) +
           (dense_input || dense_weight ? s.expand : 0.0);
  };
  const double dense_input = std::min(cost(true, true), cost(true, false));
  const double own_input = std::min(cost(false, true), cost(false, false));
  const double of_input = dense_input <= own_input ? s.dense_input + s.expand : s.own_input;
  const double of_weight = std::min(dense_input, own_input) - of_input;
  if (part == Part::grad_input) return {dense_input - of_weight, own_input - of_weight};
  return {std::min(cost(true, true), cost(false, true)) - of_input,
          std::min(cost(true, false), cost(false, false)) - of_input};
}

void add_backward(const BackwardCosts& costs, Mask mask, Part part, Candidates& candidates) {
  const bool input = part == Part::grad_input;
  const OfPart seconds = seconds_of_part(costs.seconds, mask, part);
  candidates.add(Algorithm::eager, input ? costs.eager_input : costs.eager_weight);
  candidates.add(Algorithm::pytorch,
                 {seconds.dense, input ? costs.dense_input_bytes : costs.dense_weight_bytes});
  if (std::isfinite(input ? costs.seconds.own_input : costs.seconds.own_weight))
    candidates.add(Algorithm::single, {seconds.own, costs.own_bytes});
}

}  // namespace

Choice choose_cuda(const ConvBlockParams& p, const Context& context, Part part) {
  const CudaConv c{.p = p, .dtype = context.dtype, .math_mode = context.math_mode};
  const CudaDevice& device = *context.device;
  Candidates candidates(was_measured(device) ? 1.0 : kClearlyFaster);
  if (part == Part::forward) {
    add_forward(predict_forward(c, device, context.save_winner_mask), candidates);
  } else {
    add_backward(predict_backward(c, device), context.mask, part, candidates);
  }
  const bool measured = context.device_index != Context::kDescribed && at::globalContext().benchmarkCuDNN();
  if (measured && part == Part::forward) {
    if (const auto s = remembered(context.device_index, forward_key(c, context.save_winner_mask)))
      candidates.measured(s->at(0), s->at(1));
  } else if (measured && (part == Part::grad_weight || context.mask[0])) {
    if (const auto s = remembered(context.device_index, backward_key(c, context.mask))) {
      const OfPart seconds = seconds_of_part(backward_seconds_of(*s), context.mask, part);
      candidates.measured(seconds.dense, seconds.own);
    }
  }
  return candidates.choose(forced_algorithm());
}

const char* basis_of(const CudaDevice& device) {
  return was_measured(device) ? "predicted from what an H100 measured"
                              : "predicted, and not measured on this GPU: ours only where clearly faster";
}

}  // namespace dlfast
#endif
