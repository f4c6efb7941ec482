// Turns the gradient of a block into what the sparse kernels read: channels_last, and zero where ReLU passes
// none.
#pragma once

namespace dlfast::DLFAST_LEVEL {

// to [N, pixels, C] of value(index there, index in [N, C, pixels]).
template <typename T, typename Value>
void transpose_planes(int64_t batch, int64_t channels, int64_t pixels, T* to, const Value& value) {
  constexpr int64_t kSquare = 16;  // pixels: a cache line of each plane is read once
  const int64_t squares = (pixels + kSquare - 1) / kSquare;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kSquare * channels));
  at::parallel_for(0, batch * squares, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / squares, first = i % squares * kSquare;
      const int64_t last = std::min(first + kSquare, pixels);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t plane = (image * channels + c) * pixels;
        for (int64_t x = first; x < last; ++x) {
          const int64_t at = (image * pixels + x) * channels + c;
          to[at] = value(at, plane + x);
        }
      }
    }
  });
}

// `from` and y are channels_last where from_last and y_last say so, else contiguous; y may be null.
template <typename T>
void to_channels_last_of(int64_t batch, int64_t channels, int64_t pixels, bool from_last, const T* from,
                         bool y_last, const T* y, T* to) {
  const auto masked = [&](T value, int64_t y_index) DLFAST_INLINE_LAMBDA {
    return static_cast<Compute<T>>(y[y_index]) <= 0 ? T(0) : value;
  };
  if (!from_last) {
    if (y == nullptr)
      return transpose_planes(batch, channels, pixels, to, [&](int64_t, int64_t i) { return from[i]; });
    return transpose_planes(batch, channels, pixels, to,
                            [&](int64_t at, int64_t i) { return masked(from[i], y_last ? at : i); });
  }
  if (!y_last) {  // only a mask lies in planes
    return transpose_planes(batch, channels, pixels, to,
                            [&](int64_t at, int64_t i) { return masked(from[at], i); });
  }
  at::parallel_for(0, batch * channels * pixels, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = masked(from[i], i);
  });
}

void to_channels_last(int64_t batch, int64_t channels, int64_t pixels, Dtype dtype, bool from_last,
                      const void* from, bool y_last, const void* y, void* to) {
  dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    to_channels_last_of(batch, channels, pixels, from_last, static_cast<const T*>(from), y_last,
                        static_cast<const T*>(y), static_cast<T*>(to));
    return true;
  });
}

void codes_to_channels_last(int64_t batch, int64_t channels, int64_t pixels, const uint8_t* from,
                            uint8_t* to) {
  transpose_planes(batch, channels, pixels, to, [&](int64_t, int64_t i) { return from[i]; });
}

}  // namespace dlfast::DLFAST_LEVEL
