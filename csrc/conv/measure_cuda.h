// With torch.backends.cudnn.benchmark the algorithms of a block are timed when a problem is first met, and
// the findings remembered, as many as a Memo holds.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <optional>
#include <vector>

#include "conv/heuristics.h"

namespace dlfast {

// Whether PyTorch is set to time what it runs, and this tensor is one that it runs on: on CUDA, not a fake of
// torch.compile.
bool goes_by_measurements(const at::Tensor& tensor);

// Whether somebody watches what runs: by hooks on saved tensors, as checkpointing does, or by a dispatch
// mode.
bool is_watched();

// Whether more may be measured with a tensor now: nobody watches, who would see every trial, and the stream
// is not being captured.
bool may_measure(const at::Tensor& tensor);

// How long `work` takes when it runs several times in a row on the current stream, as in a training loop: the
// shortest of three, after one to warm up. Infinite where it finds no memory. Waits for the device.
double seconds_of(const std::function<void()>& work);

// Seconds, in an order that is the caller's, as they were remembered under `key`.
std::optional<std::vector<double>> remembered(const MemoKey& key);
void remember(const MemoKey& key, std::vector<double> seconds);
void forget_measurements();

// What `remembered` holds of a backward.
struct BackwardSeconds {
  double expand;  // which both dense gradients need, once
  double dense_input, own_input;
  double dense_weight, own_weight;  // with grad_bias

  std::vector<double> list() const { return {expand, dense_input, own_input, dense_weight, own_weight}; }
  static BackwardSeconds of(const std::vector<double>& s) {
    return {s.at(0), s.at(1), s.at(2), s.at(3), s.at(4)};
  }
};

// Keys of the forward and the backward of a block; equal for equal problems on equal devices.
MemoKey forward_key(const CudaConv& c, int64_t device_index, bool save_winner_mask);
MemoKey backward_key(const CudaConv& c, int64_t device_index, Mask mask);

}  // namespace dlfast
