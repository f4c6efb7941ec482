#include "conv/measure_cuda.h"

#ifdef DLFAST_WITH_CUDA
#include <ATen/Context.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/core/Device.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>

namespace dlfast {
namespace {

constexpr int kRounds = 3, kInARow = 5;

struct OfDevice {
  Memo<std::vector<double>> seconds;
  std::atomic<bool> loaded{false};
  std::atomic<int> unsaved{0};
};

// Never destroyed: the keeper is Python's, which is gone before objects of C++ are.
struct Memory {
  std::array<OfDevice, C10_COMPILE_TIME_MAX_GPUS> devices;
  MeasurementKeeper keeper;
};

Memory& memory() {
  static Memory& memory = *new Memory;
  return memory;
}

OfDevice& of_device(int64_t device) {
  return memory().devices.at(static_cast<size_t>(device));
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

std::optional<std::vector<double>> remembered(int64_t device, const MemoKey& key) {
  OfDevice& own = of_device(device);
  // Nobody waits for a thread that loads: it may be waiting for Python, which another one holds.
  if (memory().keeper.load && !own.loaded.exchange(true)) {
    for (auto& [known, seconds] : memory().keeper.load(device)) own.seconds.put(known, std::move(seconds));
  }
  return own.seconds.find(key);
}

void remember(int64_t device, const MemoKey& key, std::vector<double> seconds) {
  OfDevice& own = of_device(device);
  own.seconds.put(key, std::move(seconds));
  if (own.unsaved.fetch_add(1) + 1 < kUnsaved || !memory().keeper.save) return;
  own.unsaved = 0;
  memory().keeper.save(device);
}

Measurements all_remembered(int64_t device) {
  return of_device(device).seconds.entries();
}

void forget_measurements() {
  for (OfDevice& own : memory().devices) {
    own.seconds.clear();
    own.loaded = false;
    own.unsaved = 0;
  }
}

void keep_measurements(MeasurementKeeper keeper) {
  memory().keeper = std::move(keeper);
}

std::vector<double> list_of(const BackwardSeconds& s) {
  return {s.expand, s.dense_input, s.own_input, s.dense_weight, s.own_weight};
}

BackwardSeconds backward_seconds_of(const std::vector<double>& list) {
  return {.expand = list.at(0),
          .dense_input = list.at(1),
          .own_input = list.at(2),
          .dense_weight = list.at(3),
          .own_weight = list.at(4)};
}

namespace {

MemoKey measurement_key(const CudaConv& c, std::initializer_list<int64_t> what) {
  MemoKey key = memo_key(c);
  key.add(what);
  key.add({at::globalContext().deterministicAlgorithms()});
  // An input in another layout is brought into the one of the output first.
  const auto& strides = c.p.input_strides;
  key.add({strides[0], strides[1], strides[2], strides[3]});
  return key;
}

}  // namespace

MemoKey forward_key(const CudaConv& c, bool save_winner_mask) {
  return measurement_key(c, {0, save_winner_mask});
}

MemoKey backward_key(const CudaConv& c, Mask mask) {
  return measurement_key(c, {1, mask[0], mask[1], mask[2]});
}

}  // namespace dlfast
#endif
