// The algorithms by which the parts of a convolution block are computed, and what a choice among them holds.
#pragma once

#include <array>
#include <cstdint>

namespace dlfast {

enum class Algorithm : int8_t {
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
constexpr int kAlgorithms = 10;
constexpr const char* kAlgorithmNames[kAlgorithms] = {"eager",  "pytorch", "direct", "winograd2", "winograd4",
                                                      "sparse", "rows",    "masked", "depthwise", "single"};

constexpr const char* name_of(Algorithm algorithm) {
  return kAlgorithmNames[static_cast<int>(algorithm)];
}

enum class Part : int8_t { forward, grad_input, grad_weight };  // grad_weight with grad_bias
constexpr const char* kPartNames[] = {"forward", "grad_input", "grad_weight"};

struct Candidate {
  Algorithm algorithm;
  double seconds;  // predicted, or on CUDA measured
  double bytes;    // read from and written to memory
};

// Candidates of one part of a block, with PyTorch's first (before it, on CUDA, eager for comparison); `best`
// is the one to take.
struct Choice {
  std::array<Candidate, 6> candidates;
  int count;
  int best;
  const char* reason;

  Algorithm algorithm() const { return candidates[best].algorithm; }
  double seconds() const { return candidates[best].seconds; }
};

// What was chosen for a block when its forward was called, of each part, as it is carried to the kernels and
// to the backward. Where nobody could choose yet, the operator does when it runs: while somebody traces there
// are no sizes, or not those that the traced program will meet.
struct ChosenAlgorithms {
  static constexpr int64_t kNotChosen = -1;
  int64_t of[3] = {kNotChosen, kNotChosen, kNotChosen};

  int64_t& operator[](Part part) { return of[static_cast<int>(part)]; }
  int64_t operator[](Part part) const { return of[static_cast<int>(part)]; }
};

}  // namespace dlfast
