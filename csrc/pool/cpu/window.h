// Pooling windows on vectors of channels: which positions a window covers, and who wins it.
#pragma once

#include "core/level.h"
#include "pool/kernels.h"

namespace dlfast::DLFAST_LEVEL {

template <typename V>
DLFAST_INLINE V relu(V v) {
  return v <= V{} ? V{} : v;  // NaN stays, as in PyTorch
}

// The part of a window along one axis that lies inside the input: positions [begin, end) of the axis, which
// are [begin - origin, end - origin) of the window.
struct Span {
  int64_t origin, begin, end;
};

DLFAST_INLINE Span window_span(const ReluPoolParams& p, int axis, int64_t index) {
  const int64_t origin = index * p.window.stride[axis] - p.window.padding[axis];
  return {origin, std::max<int64_t>(origin, 0), std::min(origin + p.window.size[axis], p.input_size[axis])};
}

// The windows [begin, end) that cover position `at` of an axis.
DLFAST_INLINE Span windows_over(const ReluPoolParams& p, int axis, int64_t at) {
  const int64_t stride = p.window.stride[axis];
  const int64_t last = at + p.window.padding[axis];
  const int64_t first = last - p.window.size[axis] + 1;
  const int64_t begin = first <= 0 ? 0 : (first + stride - 1) / stride;
  return {0, begin, std::min(last / stride + 1, p.output_size[axis])};
}

// Whether a position is one of the input. A winner mask that forward gave always names such a position; one
// that somebody made up must not lead outside of memory.
DLFAST_INLINE bool is_inside(const ReluPoolParams& p, int64_t h, int64_t w) {
  return static_cast<uint64_t>(h) < static_cast<uint64_t>(p.input_size[0]) &&
         static_cast<uint64_t>(w) < static_cast<uint64_t>(p.input_size[1]);
}

// Length of a window for the average: padding counts, what lies beyond it (ceil_mode) does not.
DLFAST_INLINE int64_t counted_length(const ReluPoolParams& p, int axis, int64_t index) {
  const int64_t origin = index * p.window.stride[axis] - p.window.padding[axis];
  return std::min(origin + p.window.size[axis], p.input_size[axis] + p.window.padding[axis]) - origin;
}

// Running maximum of a window and its position: the first maximum wins, a NaN beats all before it.
template <typename V>
struct Winner {
  using Index = decltype(V{} < V{});
  using Position = std::remove_reference_t<decltype(Index{}[0])>;
  V value;
  Index position;

  DLFAST_INLINE void start(int64_t first_position) {
    using Scalar = std::remove_reference_t<decltype(value[0])>;
    value = V{} - std::numeric_limits<Scalar>::infinity();
    position = Index{} + static_cast<Position>(first_position);
  }
  DLFAST_INLINE void offer(V v, int64_t at) {
    const Index better = (v > value) | (v != v);
    value = better ? v : value;
    position = better ? Index{} + static_cast<Position>(at) : position;
  }
  // The same for all four of a window at once, if they are finite.
  DLFAST_INLINE void of_finite(const V (&v)[4]) {
    const Index right = v[1] > v[0], below_right = v[3] > v[2];  // -1 where true
    const V upper = right ? v[1] : v[0], lower = below_right ? v[3] : v[2];
    const Index below = lower > upper;
    value = below ? lower : upper;
    position = below ? 2 - below_right : -right;
  }
  DLFAST_INLINE void apply_relu() {
    const Index dead = value <= V{};
    value = dead ? V{} : value;
    position = dead ? Index{} - 1 : position;  // kNoWinner in every winner mask width
  }
};

template <typename WinnerMask, typename Index>
DLFAST_INLINE void store_winner_mask(WinnerMask* p, Index position) {
  constexpr int n = sizeof(Index) / sizeof(position[0]);
  store(p, convert_integers<Vec<WinnerMask, n>>(position));
}

}  // namespace dlfast::DLFAST_LEVEL
