#include "conv_relu_pool/measure_cuda.h"

#ifdef DLFAST_WITH_CUDA
#include <ATen/Context.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <sstream>
#include <unordered_map>

namespace dlfast {
namespace {

constexpr int kRounds = 3;

struct Memory {
  std::mutex mutex;
  std::unordered_map<std::string, std::vector<double>> seconds;
};

Memory& memory() {
  static Memory all;
  return all;
}

}  // namespace

bool may_measure(const at::Tensor& tensor) {
  return at::globalContext().benchmarkCuDNN() && tensor.is_cuda() && tensor.numel() > 0 &&
         !tensor.key_set().has(c10::DispatchKey::Python) &&
         c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

double seconds_of(const std::function<void()>& work) {
  double best = std::numeric_limits<double>::infinity();
  try {
    work();
    for (int round = 0; round < kRounds; ++round) {
      at::cuda::CUDAEvent begin(cudaEventDefault), end(cudaEventDefault);
      begin.record();
      work();
      end.record();
      end.synchronize();
      best = std::min(best, static_cast<double>(begin.elapsed_time(end)) * 1e-3);
    }
  } catch (const c10::OutOfMemoryError&) {
    return std::numeric_limits<double>::infinity();
  }
  return best;
}

std::optional<std::vector<double>> remembered(const std::string& key) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  const auto found = memory().seconds.find(key);
  if (found == memory().seconds.end()) return std::nullopt;
  return found->second;
}

void remember(const std::string& key, std::vector<double> seconds) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().seconds[key] = std::move(seconds);
}

void forget_measurements() {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().seconds.clear();
}

bool pytorch_is_faster(const std::string& key, const std::function<void()>& ours,
                       const std::function<void()>& pytorch) {
  auto seconds = remembered(key);
  if (!seconds) {
    seconds = {seconds_of(ours), seconds_of(pytorch)};
    remember(key, *seconds);
  }
  return (*seconds)[1] < (*seconds)[0];
}

std::string measurement_key(const char* part, const CudaConv& c, int64_t device_index, bool flag) {
  std::ostringstream key;
  const ConvParams& p = c.p.conv;
  const ReluPoolParams& r = c.p.pool;
  key << part << ' ' << device_index << ' ' << static_cast<int>(c.dtype) << ' '
      << static_cast<int>(c.products) << ' ' << flag << ' ' << p.batch << ' ' << p.in_channels << ' '
      << p.out_channels << ' ' << p.groups;
  for (const int axis : {0, 1}) {
    key << ' ' << p.input_size[axis] << ' ' << p.kernel[axis] << ' ' << p.stride[axis] << ' '
        << p.padding[axis] << ' ' << p.dilation[axis] << ' ' << r.output_size[axis] << ' '
        << r.window.size[axis] << ' ' << r.window.stride[axis] << ' ' << r.window.padding[axis];
  }
  key << ' ' << static_cast<int>(r.activation) << ' ' << static_cast<int>(r.pool) << ' ' << r.channels_last
      << ' ' << at::globalContext().deterministicAlgorithms();
  return key.str();
}

}  // namespace dlfast
#endif
