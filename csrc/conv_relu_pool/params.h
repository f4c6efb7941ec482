// Problem descriptions of the fused blocks: plain old data, shared by every backend.
//
// The pass after a convolution reads its output z [N, C, H, W] and writes y [N, C, PH, PW]:
//     y = pool(activation(z + bias))
// and, where backward needs it, a code:
//   max pooling         one number per pooled element: the winning position kh * size[1] + kw in its
//                       window, or kNoWinner where ReLU passes no gradient. uint8 for windows of up to 255
//                       positions, int32 beyond. Same layout as y.
//   average after ReLU  one bit per element of z, set where gradient passes: bit i % 8 of byte i / 8 for
//                       element i in memory order of z.
//   ReLU alone          none: y itself says where gradient passes, and is handed over as the code.
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

struct ReluPoolParams {
  int64_t batch;
  int64_t channels;
  int64_t input_size[2];   // H, W of the convolution output z
  int64_t output_size[2];  // PH, PW; equal to input_size without pooling
  PoolWindow window;
  Activation activation;
  Pool pool;
  bool channels_last;  // layout of z, y and code, all dense: [N, H, W, C] if set, else [N, C, H, W]

  int64_t input_numel() const { return batch * channels * input_size[0] * input_size[1]; }
  int64_t output_numel() const { return batch * channels * output_size[0] * output_size[1]; }
  int64_t window_positions() const { return window.size[0] * window.size[1]; }
  bool wide_code() const { return window_positions() > 255; }
};

// What "no gradient" is in a code of each width.
template <typename Code>
constexpr Code kNoWinner = static_cast<Code>(-1);

struct ConvParams {
  int64_t batch;
  int64_t in_channels;
  int64_t out_channels;
  int64_t input_size[2];
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];
  int64_t groups;
  int64_t output_size[2];  // of the convolution

  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  int64_t positions() const { return kernel[0] * kernel[1]; }
};

struct ConvBlockParams {
  ConvParams conv;
  ReluPoolParams pool;       // pool.input_size == conv.output_size
  int64_t input_strides[4];  // of the input [N, C, H, W], in elements; any layout
  int64_t grain;             // pooled rows a unit of work has at most
  int64_t winograd;          // side of the output tiles, 0 for the direct convolution

  int64_t tile() const { return winograd == 0 ? 1 : winograd; }
};

}  // namespace dlfast
