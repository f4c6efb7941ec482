// Copies between tensors of any accepted dtype and layout and the float32 workspace of the kernels.
#pragma once

#include "conv/cpu/kernels.h"
#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

// Runs body(T{}) for the dtypes that the kernels of blocks take.
template <typename Body>
bool dispatch_block(Dtype dtype, const Body& body) {
  if (dtype == Dtype::bfloat16) return body(c10::BFloat16{});
  if (dtype == Dtype::float16) return body(c10::Half{});
  return body(float{});
}

// `count` numbers that lie together, from a dtype of tensors to float or back.
template <typename From, typename To>
DLFAST_INLINE void convert(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
  }
}

// to[j * to_stride + i] = row(i, j)[0] for i < rows, j < cols; row(i, j) is a vector of what stands at j and
// after it in row i, one(i, j) a single number.
template <typename T, typename Row, typename One>
DLFAST_INLINE void transpose_with(int64_t rows, int64_t cols, T* to, int64_t to_stride, const Row& row,
                                  const One& one) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_cols = cols / kLanes * kLanes;
  for (int64_t i = 0; i < whole_rows; i += kLanes) {
    for (int64_t j = 0; j < whole_cols; j += kLanes) {
      Vec<T, kLanes> square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = row(i + r, j);
      transpose(square);
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * to_stride + i, square[r]);
    }
  }
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = j < whole_cols ? whole_rows : 0; i < rows; ++i) to[j * to_stride + i] = one(i, j);
  }
}

// to[j][i] = from[i][j], rows `from_stride` and `to_stride` apart.
template <typename From, typename To>
void transpose_matrix(const From* from, int64_t from_stride, int64_t rows, int64_t cols, To* to,
                      int64_t to_stride) {
  if constexpr (std::is_same_v<From, To> && std::is_arithmetic_v<To>) {
    transpose_with(
        rows, cols, to, to_stride,
        [&](int64_t i, int64_t j)
            DLFAST_INLINE_LAMBDA { return load<Vec<To, kLanes>>(from + i * from_stride + j); },
        [&](int64_t i, int64_t j) DLFAST_INLINE_LAMBDA { return from[i * from_stride + j]; });
  } else {
    constexpr int64_t kSquare = 8;  // a cache line of either side is used whole
    for (int64_t i0 = 0; i0 < rows; i0 += kSquare) {
      const int64_t i1 = std::min(i0 + kSquare, rows);
      for (int64_t j = 0; j < cols; ++j) {
        for (int64_t i = i0; i < i1; ++i) to[j * to_stride + i] = static_cast<To>(from[i * from_stride + j]);
      }
    }
  }
}

// to[x][c] = from[c * stride_c + x * stride_x]: a row of planes becomes pixels of channels.
template <typename T>
void transpose_rows(const T* from, int64_t stride_c, int64_t stride_x, int64_t channels, int64_t count,
                    float* to, int64_t to_stride) {
  if (stride_x == 1) return transpose_matrix(from, stride_c, channels, count, to, to_stride);
  constexpr int64_t kSquare = 8;  // pixels stay in the first-level cache
  for (int64_t x0 = 0; x0 < count; x0 += kSquare) {
    const int64_t x1 = std::min(x0 + kSquare, count);
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = from + c * stride_c;
      for (int64_t x = x0; x < x1; ++x) to[x * to_stride + c] = static_cast<float>(plane[x * stride_x]);
    }
  }
}

template <typename T>
void transpose_rows(const T* from, int64_t stride_c, int64_t stride_x, int64_t channels, int64_t count,
                    float* to) {
  transpose_rows(from, stride_c, stride_x, channels, count, to, channels);
}

}  // namespace dlfast::DLFAST_LEVEL
