// Which way a block is computed, and why: the one place for it.
//
// Every way is a candidate with a predicted cost; the cheapest that accepts the problem is chosen.
// DLFAST_PLAN (see plan.cpp) overrides the choice for tests and measurements.
#pragma once

#include <array>
#include <string_view>

#include "conv_relu_pool/conv_cuda.h"
#include "conv_relu_pool/cpu_kernels.h"

namespace dlfast {

enum class Path {
  eager,      // PyTorch's kernels one by one, each keeping what its backward needs
  pytorch,    // forward: PyTorch's convolution, then one pass of ours over its output;
              // backward: one pass of ours expands the gradient, then PyTorch's convolution_backward
  direct,     // forward: our kernels, the convolution output is never written
  winograd2,  // the same by Winograd's method, in tiles of 2x2 outputs
  winograd4,  // in tiles of 4x4 outputs; for grad_input the convolution of the gradient, for grad_weight its
              // transpose
  sparse,     // backward: our kernels, what passes no gradient is skipped
  rows,       // the same for few input channels, grad_weight only
  masked,     // grad_weight of few input channels: every product, the gradient masked by who won
  depthwise,  // one kernel per channel: ours, every product, no pooling
  single,     // CUDA: one kernel of ours, neither the convolution output nor its gradient is written
};

const char* path_name(Path path);

struct Candidate {
  Path path;
  double flops;        // at the full speed of the machine that take as long as the arithmetic does
  double bytes;        // read from and written to memory
  double seconds = 0;  // on CUDA, in place of flops
};

// Candidates of one part of a block, with PyTorch's first; `best` is the one to take.
struct Choice {
  std::array<Candidate, 6> candidates;
  int count;
  int best;

  Path path() const { return candidates[best].path; }
};

// What a plan depends on besides the block.
struct PlanContext {
  Dtype dtype;
  bool cpu;
  bool save_code;
  int64_t threads;
  const CudaDevice* device;  // null where not on CUDA
  Products products;         // on CUDA
  // Which of grad_input, grad_weight and grad_bias are wanted, by what was measured of a backward.
  std::array<bool, 3> mask = {true, true, true};
};

enum class Part { forward, grad_input, grad_weight };

Choice plan_forward(const ConvBlockParams& p, const PlanContext& context);
Choice plan_grad_weight(const ConvBlockParams& p, const PlanContext& context);  // and grad_bias
Choice plan_grad_input(const ConvBlockParams& p, const PlanContext& context);
#ifdef DLFAST_WITH_CUDA
Choice plan_cuda(const ConvBlockParams& p, const PlanContext& context, Part part, std::string_view forced);
// The least seconds that a forward takes on the device of `context`.
double floor_seconds(const ConvBlockParams& p, const PlanContext& context);
#endif

// Whether DLFAST_PLAN takes the choice away on CUDA.
bool cuda_plan_is_forced();

// Multiplications and additions of the convolution itself, each one, as they are usually counted.
double convolution_flops(const ConvParams& conv);

// Pooled rows in a unit of work, where a convolution row costs `floats_per_conv_row` of scratch: as many as
// stay in cache, but few enough that every thread has several units.
int64_t plan_grain(const ConvBlockParams& p, double floats_per_conv_row, int64_t threads);
int64_t grad_input_grain(const ConvBlockParams& p, int64_t threads);
int64_t grad_weight_grain(const ConvBlockParams& p, GradWeightWay way, int64_t threads);

}  // namespace dlfast
