// With torch.backends.cudnn.benchmark the algorithms of a block are timed when a problem is first met, and
// the findings remembered, as many as a Memo holds.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "conv/heuristics.h"
#include "conv/predict_cuda.h"

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

// Seconds, in an order that is the caller's, as they were remembered under `key` for a device: in this
// process, or in one before it where there is a keeper.
using Measurements = std::vector<std::pair<MemoKey, std::vector<double>>>;
std::optional<std::vector<double>> remembered(int64_t device, const MemoKey& key);
void remember(int64_t device, const MemoKey& key, std::vector<double> seconds);
Measurements all_remembered(int64_t device);
// As in a new process.
void forget_measurements();

// What keeps measurements for other processes. `load` is called once for a device, before the first of its
// measurements is asked for; `save` when there are kUnsaved more of them than before.
struct MeasurementKeeper {
  std::function<Measurements(int64_t device)> load;
  std::function<void(int64_t device)> save;
};
constexpr int kUnsaved = 32;
void keep_measurements(MeasurementKeeper keeper);

// What `remembered` holds of a backward: BackwardSeconds.
std::vector<double> list_of(const BackwardSeconds& s);
BackwardSeconds backward_seconds_of(const std::vector<double>& list);

// Keys of the forward and the backward of a block; equal for equal problems.
MemoKey forward_key(const CudaConv& c, bool save_winner_mask);
MemoKey backward_key(const CudaConv& c, Mask mask);

}  // namespace dlfast
