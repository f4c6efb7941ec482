// Turns the gradient of a block into what the sparse kernels read: channels_last, and zero where ReLU passes
// none.
#pragma once

#include "conv/cpu/copy.h"
#include "conv/cpu/kernels.h"
#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

// Runs body(image, first, last) for some pixels of an image at a time, all channels.
template <typename Body>
void for_pixels(int64_t batch, int64_t channels, int64_t pixels, const Body& body) {
  constexpr int64_t kSome = 64;  // a few cache lines of each plane
  const int64_t parts = (pixels + kSome - 1) / kSome;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kSome * channels));
  at::parallel_for(0, batch * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * kSome;
      body(i / parts, first, std::min(first + kSome, pixels));
    }
  });
}

// `from` and y are channels_last where from_last and y_last say so, else contiguous; y may be null.
template <typename T>
void to_channels_last_of(int64_t batch, int64_t channels, int64_t pixels, bool from_last, const T* from,
                         bool y_last, const T* y, T* to) {
  const auto masked = [](T value, T of)
                          DLFAST_INLINE_LAMBDA { return static_cast<Compute<T>>(of) <= 0 ? T(0) : value; };
  for_pixels(batch, channels, pixels, [&](int64_t image, int64_t first, int64_t last) {
    const int64_t plane = image * channels * pixels + first, start = (image * pixels + first) * channels;
    const int64_t count = last - first;
    if (!from_last) {
      if constexpr (std::is_same_v<T, float>) {
        if (y != nullptr && !y_last) {
          transpose_with(
              channels, count, to + start, channels,
              [&](int64_t c, int64_t x) DLFAST_INLINE_LAMBDA {
                using V = Vec<T, kLanes>;
                const int64_t at = plane + c * pixels + x;
                return load<V>(y + at) <= V{} ? V{} : load<V>(from + at);
              },
              [&](int64_t c, int64_t x) DLFAST_INLINE_LAMBDA {
                const int64_t at = plane + c * pixels + x;
                return masked(from[at], y[at]);
              });
          return;
        }
      }
      transpose_matrix(from + plane, pixels, channels, count, to + start, channels);
      if (y == nullptr) return;
    }
    const T* source = from_last ? from : to;
    if (y_last) {
      for (int64_t i = start; i < start + count * channels; ++i) to[i] = masked(source[i], y[i]);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < count; ++x) {
        const int64_t at = start + x * channels + c;
        to[at] = masked(source[at], y[plane + c * pixels + x]);
      }
    }
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

void winner_mask_to_channels_last(int64_t batch, int64_t channels, int64_t pixels, const uint8_t* from,
                                  uint8_t* to) {
  for_pixels(batch, channels, pixels, [&](int64_t image, int64_t first, int64_t last) {
    transpose_matrix(from + image * channels * pixels + first, pixels, channels, last - first,
                     to + (image * pixels + first) * channels, channels);
  });
}

}  // namespace dlfast::DLFAST_LEVEL
