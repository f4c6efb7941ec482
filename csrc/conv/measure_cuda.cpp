#include "conv/measure_cuda.h"

#ifdef DLFAST_WITH_CUDA
#include <ATen/Context.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace dlfast {
namespace {

constexpr int kRounds = 3, kInARow = 5;

Memo<std::vector<double>>& memory() {
  static Memo<std::vector<double>> seconds;
  return seconds;
}

}  // namespace

bool goes_by_measurements(const at::Tensor& tensor) {
  return at::globalContext().benchmarkCuDNN() && tensor.is_cuda() && tensor.numel() > 0 &&
         !tensor.key_set().has(c10::DispatchKey::Python);
}

bool is_watched() {
  return at::SavedTensorDefaultHooks::get_hooks().has_value() || c10::impl::dispatch_mode_enabled();
}

bool may_measure(const at::Tensor& tensor) {
  return goes_by_measurements(tensor) && !is_watched() &&
         c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

double seconds_of(const std::function<void()>& work) {
  double best = std::numeric_limits<double>::infinity();
  try {
    work();
    for (int round = 0; round < kRounds; ++round) {
      at::cuda::CUDAEvent begin(cudaEventDefault), end(cudaEventDefault);
      begin.record();
      // While the device works the host prepares more: one alone would be measured with its launch.
      for (int i = 0; i < kInARow; ++i) work();
      end.record();
      end.synchronize();
      best = std::min(best, static_cast<double>(begin.elapsed_time(end)) * 1e-3 / kInARow);
    }
  } catch (const c10::OutOfMemoryError&) {
    return std::numeric_limits<double>::infinity();
  }
  return best;
}

std::optional<std::vector<double>> remembered(const MemoKey& key) {
  return memory().find(key);
}

void remember(const MemoKey& key, std::vector<double> seconds) {
  memory().put(key, std::move(seconds));
}

void forget_measurements() {
  memory().clear();
}

namespace {

MemoKey measurement_key(const CudaConv& c, int64_t device_index, std::initializer_list<int64_t> what) {
  MemoKey key = memo_key(c);
  key.add(what);
  key.add({device_index, at::globalContext().deterministicAlgorithms()});
  // An input in another layout is brought into the one of the output first.
  const auto& strides = c.p.input_strides;
  key.add({strides[0], strides[1], strides[2], strides[3]});
  return key;
}

}  // namespace

MemoKey forward_key(const CudaConv& c, int64_t device_index, bool save_winner_mask) {
  return measurement_key(c, device_index, {0, save_winner_mask});
}

MemoKey backward_key(const CudaConv& c, int64_t device_index, Mask mask) {
  return measurement_key(c, device_index, {1, mask[0], mask[1], mask[2]});
}

}  // namespace dlfast
#endif
