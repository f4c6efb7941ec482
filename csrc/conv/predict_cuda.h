// What each algorithm of a block is predicted to take on a CUDA device, and what it moves.
//
// The constants in predict_cuda.cpp follow what one H100 measured (benchmarks/results/h100). On other
// architectures the same shares of another peak are a guess: `was_measured` says so.
#pragma once

#include <optional>

#include "conv/cuda/kernels.h"

namespace dlfast {

bool was_measured(const CudaDevice& device);

struct Cost {
  double seconds;
  double bytes;  // of memory, read and written
};

// Each is Algorithm's of that name; single where our kernels take the problem.
struct Costs {
  Cost eager, pytorch;
  std::optional<Cost> single;
};

Costs predict_forward(const CudaConv& c, const CudaDevice& device, bool save_winner_mask);

// Seconds of the pieces of a backward. A piece that our kernels do not take is infinite.
struct BackwardSeconds {
  double expand;  // which both dense gradients need, once
  double dense_input, own_input;
  double dense_weight, own_weight;  // with grad_bias
};

// Bytes count an expansion, or what eager PyTorch does in its place, with half to each gradient; so do the
// seconds of eager.
struct BackwardCosts {
  BackwardSeconds seconds;
  Cost eager_input, eager_weight;
  double dense_input_bytes, dense_weight_bytes;
  double own_bytes;  // of either gradient
};

BackwardCosts predict_backward(const CudaConv& c, const CudaDevice& device);

// The least seconds that a forward takes.
double floor_seconds(const CudaConv& c, const CudaDevice& device, bool save_winner_mask);

}  // namespace dlfast
