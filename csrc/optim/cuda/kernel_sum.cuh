// Sums in a fixed order: the norm of the gradients, and what rules measure of their tensors.
//
// A block sums one unit; what the blocks have found is summed by the last one to come (the norm), or by a
// launch of its own (a block for each tensor). No sum depends on the order in which blocks run.
#pragma once

#include "optim/cuda/kernel_formats.cuh"

namespace dlfast::optim {

template <typename Real>
DLFAST_DEVICE Real clamped(Real x, Real limit) {
  // NaN compares false and stays.
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// The sum over all threads, for thread 0. `room` [kWarps] is shared memory.
DLFAST_DEVICE double sum_of_block(double x, int thread, double* room) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  __syncthreads();  // the room is free
  if (thread % kWarp == 0) room[thread / kWarp] = x;
  __syncthreads();
  double total = 0;
  if (thread == 0) {
    for (int w = 0; w < kWarps; ++w) total += room[w];
  }
  return total;
}

// The sum of parts[0], parts[stride] ... of `count`, for thread 0.
DLFAST_DEVICE double sum_of_parts(const double* parts, int64_t count, int stride, int thread, double* room) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = thread; i < count; i += kThreads) sum += __ldcg(parts + i * stride);
  return sum_of_block(sum, thread, room);
}

struct SumShared {
  TensorRef tensor;
  double unscale;
  bool last, skip;
  double room[kWarps];
};

// The squares of `count` numbers. In float, where that neither overflows nor loses anything: a double has an
// eighth of the speed or less on many GPUs.
template <int kCount, typename Real>
DLFAST_DEVICE double squares_of(const Real* x) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += x[i] * x[i];
    if (sum > 1e-25f && sum < 1e30f) return sum;
  }
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

template <typename T>
DLFAST_DEVICE double squares_of_block(const StepScalars& s, const SumShared& shared, int64_t first, int count,
                                      bool wide, int thread) {
  constexpr int kCount = kPackBytes / sizeof(T);
  const Lane<kCount, kCount> lane{.first = first, .count = count, .lane = thread % kWarp, .wide = wide};
  Accumulator<T> g[kCount];
  lane.template load<T>(shared.tensor.grad, g);
  if (s.options.max_grad_value >= 0) {
    const auto unscale = static_cast<Accumulator<T>>(shared.unscale);
    const auto limit = static_cast<Accumulator<T>>(s.options.max_grad_value);
#pragma unroll
    for (int i = 0; i < kCount; ++i) g[i] = clamped(g[i] * unscale, limit);
  }
  return squares_of<kCount>(g);
}

// Blocks [0, blocks) of a launch that writes the sum of the squares of all gradients, unscaled and clamped,
// to squares[index]; `adds` it to what an earlier launch has left there.
template <typename T>
DLFAST_DEVICE void norm_block(const Table& table, const StepScalars& s, int index, bool adds, unsigned block,
                              unsigned blocks, int thread, SumShared& shared) {
  if (thread == 0) {
    const TensorRef* tensors = table.all();
    shared.tensor = tensors[find_tensor(tensors, table.count, block)];
    shared.unscale = unscale_of(s);
  }
  __syncthreads();
  const UnitSpan span = span_of(shared.tensor, block);
  constexpr int kBlock = kPackBytes / sizeof(T) * kWarp;
  const bool aligned = reinterpret_cast<uintptr_t>(shared.tensor.grad) % kPackBytes == 0;
  double sum = 0;
  for (int at = thread / kWarp * kBlock; at < span.count; at += kWarps * kBlock) {
    const int left = span.count - at;
    sum += squares_of_block<T>(s, shared, span.begin + at, left, aligned && left >= kBlock, thread);
  }
  sum = sum_of_block(sum, thread, shared.room);
  if (thread == 0) {
    if (s.options.max_grad_value < 0) sum *= shared.unscale * shared.unscale;
    s.memory.parts[block] = sum;
    shared.last = arrives_last(s.memory.arrived, blocks);
  }
  __syncthreads();
  if (!shared.last) return;
  const double total = sum_of_parts(s.memory.parts, blocks, 1, thread, shared.room);
  if (thread == 0) s.memory.squares[index] = adds ? s.memory.squares[index] + total : total;
}

// Block `block` of a launch with one for each tensor: from what Pass::measure has left, the quotient of the
// norms of parameter and direction.
DLFAST_DEVICE void trust_block(const Table& table, const StepScalars& s, unsigned block, int thread,
                               SumShared& shared) {
  if (thread == 0) {
    shared.tensor = table.all()[block];
    shared.skip = verdict_of(s).skip;
  }
  __syncthreads();
  if (shared.skip) return;  // nothing was measured
  const int64_t units = units_of(shared.tensor.numel, kUnit);
  const double* parts = s.memory.parts + 2 * shared.tensor.first_unit;
  const double of_param = sum_of_parts(parts, units, 2, thread, shared.room);
  const double of_direction = sum_of_parts(parts + 1, units, 2, thread, shared.room);
  if (thread != 0) return;
  s.memory.trust[block] = of_param > 0 && of_direction > 0 ? sqrt(of_param / of_direction) : 1;
}

}  // namespace dlfast::optim
