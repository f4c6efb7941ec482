// With torch.backends.cudnn.benchmark the ways of a block are timed when a problem is first met, and the
// findings remembered for as long as the process lives.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "conv_relu_pool/conv_cuda.h"

namespace dlfast {

// Whether PyTorch is set to time what it runs, and this tensor is something to time it with: on CUDA, not a
// fake of torch.compile, its stream not being captured.
bool may_measure(const at::Tensor& tensor);

// How long `work` keeps the current stream busy: the shortest of three, after one to warm up. Infinite where
// it finds no memory. Waits for the device.
double seconds_of(const std::function<void()>& work);

// Seconds by way, in an order that is the caller's, as they were remembered under `key`.
std::optional<std::vector<double>> remembered(const std::string& key);
void remember(const std::string& key, std::vector<double> seconds);
void forget_measurements();

// Whether PyTorch's own way was faster than ours, timed once under `key`.
bool pytorch_is_faster(const std::string& key, const std::function<void()>& ours,
                       const std::function<void()>& pytorch);

// A key for one part of a block; equal for equal problems on equal devices.
std::string measurement_key(const char* part, const CudaConv& c, int64_t device_index, bool flag);

}  // namespace dlfast
