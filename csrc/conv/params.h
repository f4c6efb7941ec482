// Convolution blocks as plain old data, shared by every backend.
#pragma once

#include <cstdint>

#include "pool/params.h"

namespace dlfast {

// What a caller asks for of a convolution, as schemas carry it.
struct ConvOptions {
  int64_t stride[2];  // height, width, as every pair
  int64_t padding[2];
  int64_t dilation[2];
  int64_t groups;
};

// And of a block: a convolution with the pass after it.
struct BlockOptions {
  ConvOptions conv;
  PoolOptions pool;
};

// That for tensors of known sizes.
struct ConvParams : ConvOptions {
  int64_t batch;
  int64_t in_channels;
  int64_t out_channels;
  int64_t input_size[2];
  int64_t kernel[2];
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
