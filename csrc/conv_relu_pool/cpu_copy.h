// Copies between tensors of any accepted dtype and layout and the float32 scratch of the kernels.
#pragma once

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

// to[x][c] = from[c * stride_c + x * stride_x]: a row of planes becomes pixels of channels.
template <typename T>
void transpose_rows(const T* from, int64_t stride_c, int64_t stride_x, int64_t channels, int64_t count,
                    float* to, int64_t to_stride) {
  constexpr int64_t kSquare = 8;  // a cache line of planes is read once, its pixels stay in the first level
  int64_t whole_c = 0, whole_x = 0;  // what squares of registers have done
  if constexpr (std::is_same_v<T, float>) {
    if (stride_x == 1) {
      whole_c = channels / kLanes * kLanes;
      whole_x = count / std::max<int64_t>(kSquare, kLanes) * std::max<int64_t>(kSquare, kLanes);
      for (int64_t c = 0; c < whole_c; c += kLanes) {
        for (int64_t x = 0; x < whole_x; x += kLanes) {
          Vec<float, kLanes> rows[kLanes];
          for (int i = 0; i < kLanes; ++i) rows[i] = load<Vec<float, kLanes>>(from + (c + i) * stride_c + x);
          transpose(rows);
          for (int i = 0; i < kLanes; ++i) store(to + (x + i) * to_stride + c, rows[i]);
        }
      }
    }
  }
  for (int64_t x0 = 0; x0 < count; x0 += kSquare) {
    const int64_t x1 = std::min(x0 + kSquare, count);
    for (int64_t c = x0 < whole_x ? whole_c : 0; c < channels; ++c) {
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
