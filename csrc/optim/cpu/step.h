// The CPU side of an optimizer step: one parallel region for any number of tensors of any dtype.
#pragma once

#include <vector>

#include "optim/params.h"

namespace dlfast::optim {

struct CpuStep {
  Algorithm algorithm;
  std::vector<TensorRef> tensors;
  std::vector<double> groups;  // kMaxHyper for each group
  StepOptions options;
};

struct CpuResult {
  double norm = 0;  // of the unscaled gradients, where measured
  bool skipped = false;
};

// Takes the step and advances the counters, unless it is skipped: then nothing but gradients changes (with
// zero_grad). `threads` may be fewer than asked for; the result is the same.
CpuResult step_cpu(CpuStep& step, int threads);

// The sum of squares of the unscaled, value-clipped gradients.
double squares_cpu(CpuStep& step, int threads);

// Element `element` of tensor `tensor`: where a thread starts.
struct Position {
  int64_t tensor;
  int64_t element;
};

// Splits tensors of `numels` elements into `parts` of nearly the same work; parts + 1 positions. Inside a
// tensor a part starts at a multiple of kUnit (step.cpp).
std::vector<Position> split_work(const std::vector<int64_t>& numels, int parts);

// ---- The functions of one SIMD level (body.h): blocks that fit into the first cache -------------------

// Updates `count` elements. `constants` is a Rule::Constants of the number type, as are the arrays.
using UpdateFn = void (*)(void* param, const void* grad, void* const* state, int64_t count,
                          const void* constants);
// Adds the squares of param and of the rule's direction to sums[0] and sums[1]; writes nothing else.
using MeasureFn = void (*)(const void* param, const void* grad, void* const* state, int64_t count,
                           const void* constants, double* sums);

struct CpuKernels {
  UpdateFn update[kAlgorithms][kMaxStates + 1][2];  // by algorithm, number of states, is float64
  MeasureFn measure[kAlgorithms][2];                // null where the rule does not measure
  // From a format to float, elements [first, first + count), first a multiple of kCodeBlock for code8.
  void (*load)(Format format, const void* from, const float* scales, int64_t first, int64_t count, float* to);
  // The other way. `random` holds 16 random bits for each element, or is null: round to nearest. What
  // `from` holds after `count`, up to a multiple of 64, may be read.
  void (*save)(Format format, const float* from, const uint16_t* random, int64_t first, int64_t count,
               void* to, float* scales);
  // The exact value of a bfloat16 parameter from both its halves, and back.
  void (*join_halves)(const void* upper, const void* lower, int64_t count, float* to);
  void (*split_halves)(const float* from, int64_t count, void* upper, void* lower);
  // 16 random bits for each of `count` elements from `first`, a multiple of 64.
  void (*random)(uint64_t seed, uint64_t step, uint32_t stream, int64_t first, int64_t count, uint16_t* to);
  // to = from * factor, not beyond -limit and limit.
  void (*clamp[2])(const void* from, double factor, double limit, int64_t count, void* to);
  // The sum of squares; not finite where an element is not.
  double (*squares[2])(const void* from, int64_t count);
  // average = average * decay + (1 - decay) * param.
  void (*average[2])(void* average, const void* param, double decay, int64_t count);
};

const CpuKernels& step_kernels();  // of the SIMD level in use

}  // namespace dlfast::optim
