#include "simd/speed.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "simd/kernels.h"

namespace dlfast {
namespace {

// The best of a few rounds: what disturbs a round only makes it slower.
template <typename Body>
double best_seconds(const Body& body) {
  double best = 1e30;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t threads = at::get_num_threads();
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) body(thread);
    });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

double peak_flops() {
  constexpr int64_t kRounds = 1 << 20;
  std::vector<double> flops(at::get_num_threads());
  const double seconds =
      best_seconds([&](int64_t thread) { flops[thread] = level_kernels().multiply_adds(kRounds); });
  double sum = 0.0;
  for (const double f : flops) sum += f;
  return sum / seconds;
}

double peak_bandwidth() {
  constexpr int64_t kBytes = 64 << 20;
  const int64_t threads = at::get_num_threads();
  // Written first by the thread that will use it, so that no page is missing or far away.
  const std::unique_ptr<char[]> memory(new char[2 * threads * kBytes]);
  best_seconds([&](int64_t thread) { std::memset(memory.get() + 2 * thread * kBytes, 1, 2 * kBytes); });
  const double seconds = best_seconds([&](int64_t thread) {
    char* from = memory.get() + 2 * thread * kBytes;
    std::memcpy(from + kBytes, from, kBytes);
  });
  return 2.0 * static_cast<double>(threads * kBytes) / seconds;
}

}  // namespace dlfast
