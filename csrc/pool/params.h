// The pass of activation and pooling as plain old data, shared by every backend.
//
// The pass after a convolution reads its output z [N, C, H, W] and writes y [N, C, PH, PW]:
//     y = pool(activation(z + bias))
// and, where backward needs it, a winner mask:
//   max pooling         one number per pooled element: the winning position kh * size[1] + kw in its
//                       window, or kNoWinner where ReLU passes no gradient. uint8 for windows of up to 255
//                       positions, int32 beyond. Same layout as y.
//   average after ReLU  one bit per element of z, set where gradient passes: bit i % 8 of byte i / 8 for
//                       element i in memory order of z.
//   ReLU alone          none: y itself says where gradient passes, and is handed over as the winner mask.
//   otherwise           none.
//
// "Gradient passes" means !(value <= 0), so NaN passes it on, as in PyTorch. In a window the first maximum
// in row-major order wins, and a NaN beats everything before it, the last NaN winning.
#pragma once

#include <cstdint>

namespace dlfast {

enum class Activation : int32_t { none = 0, relu = 1 };
enum class Pool : int32_t { none = 0, max = 1, avg = 2 };

struct PoolWindow {
  int64_t size[2];  // height, width, as every pair below
  int64_t stride[2];
  int64_t padding[2];
};

// What a caller asks for, as schemas carry it.
struct PoolOptions {
  Activation activation;
  Pool pool;
  PoolWindow window;
  bool ceil_mode;

  bool is_nothing() const { return activation == Activation::none && pool == Pool::none; }
};

// That for tensors of known sizes. Without pooling the window is one position.
struct ReluPoolParams : PoolOptions {
  int64_t batch;
  int64_t channels;
  int64_t input_size[2];   // H, W of the convolution output z
  int64_t output_size[2];  // PH, PW; equal to input_size without pooling
  bool channels_last;  // layout of z, y and winner mask, all dense: [N, H, W, C] if set, else [N, C, H, W]

  int64_t input_numel() const { return batch * channels * input_size[0] * input_size[1]; }
  int64_t output_numel() const { return batch * channels * output_size[0] * output_size[1]; }
  int64_t window_positions() const { return window.size[0] * window.size[1]; }
  bool wide_winner_mask() const { return window_positions() > 255; }
};

// What "no gradient" is in a winner mask of each width.
template <typename WinnerMask>
constexpr WinnerMask kNoWinner = static_cast<WinnerMask>(-1);

}  // namespace dlfast
