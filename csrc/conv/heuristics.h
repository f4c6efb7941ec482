// Which algorithm computes each part of a block, and why: the one place that chooses.
//
// Every algorithm that takes the problem is a candidate with its predicted seconds; the fastest is chosen,
// once per call, and carried to where it is used. DLFAST_ALGORITHM overrides the choice, for tests and
// measurements.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "conv/algorithm.h"
#include "conv/cuda/kernels.h"
#include "conv/options.h"
#include "core/gradients.h"

namespace dlfast {

// What a choice depends on besides the block.
struct Context {
  static constexpr int64_t kDescribed = -1;

  Dtype dtype;
  bool cpu;               // there is something to compute, and on a CPU
  bool save_winner_mask;  // a backward will follow
  int64_t threads;
  double flops;              // of a CPU's threads together, per second: what times are scaled by
  const CudaDevice* device;  // null where not on CUDA
  MathMode math_mode;        // on CUDA
  int64_t device_index;      // of that device, or kDescribed: nothing was measured on it
  Mask mask;                 // gradients that are wanted, which share parts of a backward
};

Context context_of(const at::Tensor& input, Dtype dtype, bool save_winner_mask,
                   Mask mask = {true, true, true});

Choice choose(const ConvBlockParams& p, const Context& context, Part part);

// The choosers of the two kinds of devices, which `choose` calls.
Choice choose_cpu(const ConvBlockParams& p, const Context& context, Part part);
// Whether an algorithm takes this part of the problem at all.
bool takes_on_cpu(const ConvBlockParams& p, const Context& context, Part part, Algorithm algorithm);
#ifdef DLFAST_WITH_CUDA
Choice choose_cuda(const ConvBlockParams& p, const Context& context, Part part);
// What predictions for a device rest on, in a few words.
const char* basis_of(const CudaDevice& device);
#endif

// What DLFAST_ALGORITHM asks for, or "". Raises for a name that is none.
std::string_view forced_algorithm();
// Whether it takes the choice away on CUDA.
bool is_forced_on_cuda();

// Why `choice` is what it is, its candidates and best being known.
const char* reason_of(const Choice& choice, std::string_view forced);

// Multiplications and additions of the convolution itself, each one, as they are usually counted.
double convolution_flops(const ConvParams& conv);

// Once per call of the public operator: what its kernels and its backward are told.
struct BlockChoice {
  ChosenAlgorithms algorithms;
  // PyTorch's kernels are what would run, forward and backward, and nothing of ours comes after them.
  bool is_plain_convolution = false;
};
BlockChoice choose_block(const at::Tensor& input, const at::Tensor& weight, const BlockOptions& options,
                         bool backward);

// The algorithm that was chosen before, or is now. Raises for one that does not take the problem.
Algorithm chosen_or_choose(const ChosenAlgorithms& algorithms, const ConvBlockParams& p,
                           const Context& context, Part part);

// All of it, for people.
struct BlockReport {
  double flops;  // of one convolution: forward, grad_input and grad_weight have as many each
  double floor;  // the least seconds of a forward
  Choice forward, grad_input, grad_weight;
  const char* basis;  // of predictions for this device; "" where there is no more to say
};

// The choices for these tensors, batched, with the number of threads set now; mask says which gradients a
// backward wants, `flops` and `bandwidth` what this CPU was measured to reach. Raises as the operator.
BlockReport report_block(const at::Tensor& input, const at::Tensor& weight, const BlockOptions& options,
                         bool save_winner_mask, Mask mask, double flops, double bandwidth);

#ifdef DLFAST_WITH_CUDA
// The same for a GPU that need not be there, and tensors that have sizes and strides at least.
BlockReport report_block_on(const CudaDevice& device, const at::Tensor& input, const at::Tensor& weight,
                            const BlockOptions& options, bool save_winner_mask, Mask mask);
#endif

}  // namespace dlfast
