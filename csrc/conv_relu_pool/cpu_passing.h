// The positions that pass gradient: with pooling at most one of each window, with ReLU alone those that are
// positive. The backward kernels multiply these only, where the dense gradient is mostly zeros.
#pragma once

namespace dlfast::DLFAST_LEVEL {

// One position that passes gradient, and the place it has for whoever listed it.
struct Live {
  float grad;
  int32_t at;
};

// The pooled gradient of a block and its code, both channels_last: [N, PH, PW, K].
template <typename T>
struct PooledGradient {
  const ConvBlockParams& p;
  const T* grad;
  const void* code;    // uint8 of max pooling, or the output (T) of ReLU alone, or null
  int32_t rows[256];   // position of each code in its window; far outside for what is no position
  int32_t cols[256];

  PooledGradient(const ConvBlockParams& p_, const T* grad_, const void* code_)
      : p(p_), grad(grad_), code(code_) {
    for (int32_t i = 0; i < 256; ++i) {
      const bool is_position = i < p.pool.window_positions() && i != kNoWinner<uint8_t>;
      rows[i] = is_position ? i / static_cast<int32_t>(p.pool.window.size[1]) : -(1 << 30);
      cols[i] = is_position ? i % static_cast<int32_t>(p.pool.window.size[1]) : 0;
    }
  }

  // Calls put(k - first, row, column, gradient, passes) for the channels [first, last) of a pooled pixel.
  // Where `passes` is false, so that row and column mean nothing, both are those of the window's corner: a
  // caller that writes always and counts only what passes has no branch to mispredict.
  template <typename Put>
  DLFAST_INLINE void visit(int64_t image, int64_t py, int64_t px, int64_t first, int64_t last,
                           const Put& put) const {
    const ReluPoolParams& pool = p.pool;
    const int64_t pixel = ((image * pool.output_size[0] + py) * pool.output_size[1] + px) * pool.channels;
    const T* grads = grad + pixel;
    if (pool.pool == Pool::max) {
      const uint8_t* codes = static_cast<const uint8_t*>(code) + pixel;
      const int64_t top = py * pool.window.stride[0] - pool.window.padding[0];
      const int64_t left = px * pool.window.stride[1] - pool.window.padding[1];
      const auto height = static_cast<uint64_t>(pool.input_size[0]);
      const auto width = static_cast<uint64_t>(pool.input_size[1]);
      for (int64_t k = first; k < last; ++k) {
        const int64_t row = top + rows[codes[k]], col = left + cols[codes[k]];
        const bool passes = (static_cast<uint64_t>(row) < height) & (static_cast<uint64_t>(col) < width);
        put(k - first, passes ? row : std::max<int64_t>(top, 0), passes ? col : std::max<int64_t>(left, 0),
            static_cast<float>(grads[k]), passes);
      }
      return;
    }
    const bool rectified = pool.activation == Activation::relu;
    const T* outputs = rectified ? static_cast<const T*>(code) + pixel : grads;
    for (int64_t k = first; k < last; ++k) {
      const bool passes = !rectified || !(static_cast<float>(outputs[k]) <= 0.0f);
      put(k - first, py, px, static_cast<float>(grads[k]), passes);
    }
  }
};

// Whether no lane of a sum of 0 * x is NaN: every x was finite.
DLFAST_INLINE bool all_zero(F doubt) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (doubt[lane] != 0.0f) return false;
  }
  return true;
}

}  // namespace dlfast::DLFAST_LEVEL
