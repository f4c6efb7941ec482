// Convolution blocks that one CUDA kernel computes, as op.cpp calls them: the convolution output and its
// gradient never touch memory.
//
// All tensors are dense and channels_last: input [N, H, W, C], weight [K, kh, kw, C], y and winner mask
// [N, PH, PW, K]. Pointers are checked by op.cpp and belong to the current device; the stream is a
// cudaStream_t. What a function does not take, `..._fits` or `..._work` says before.
//
// winner mask is what params.h says. Without pooling it is y of the forward, or null without ReLU.
#pragma once

#include <optional>

#include "conv/params.h"
#include "core/memo.h"
#include "pool/kernels.h"

namespace dlfast {

// What the launches know of a device; asked once per device.
struct CudaDevice {
  int64_t arch;          // 10 * major + minor: 80, 86, 90, 120
  int64_t code_arch;     // what the kernels it runs were compiled for: less, where from older PTX
  int64_t processors;    // streaming multiprocessors
  int64_t shared_bytes;  // that one block may have
  double clock;          // Hz
  double bandwidth;      // of its memory, bytes per second
};

const CudaDevice& current_cuda_device();
int64_t code_architecture();  // of the current device; current_cuda_device() remembers it

// How the products of a block are computed.
enum class MathMode : int32_t {
  fma,  // in float32, by ordinary arithmetic: float32 exactly, and 16-bit types where there is no more
  tensor_core,  // 16-bit types; float32 rounded to TF32
};

struct CudaConv {
  ConvBlockParams p;
  Dtype dtype;
  MathMode math_mode;
};

// Equal for blocks that the functions below treat alike on one device.
inline MemoKey memo_key(const CudaConv& c) {
  const ConvParams& p = c.p.conv;
  const ReluPoolParams& r = c.p.pool;
  MemoKey key{static_cast<int64_t>(c.dtype),
              static_cast<int64_t>(c.math_mode),
              static_cast<int64_t>(r.activation),
              static_cast<int64_t>(r.pool),
              r.channels_last,
              p.batch,
              p.in_channels,
              p.out_channels,
              p.groups};
  for (const int axis : {0, 1}) {
    key.add({p.input_size[axis], p.kernel[axis], p.stride[axis], p.padding[axis], p.dilation[axis],
             r.output_size[axis], r.window.size[axis], r.window.stride[axis], r.window.padding[axis]});
  }
  return key;
}

inline MemoKey memo_key(const CudaConv& c, const CudaDevice& device) {
  MemoKey key = memo_key(c);
  key.add({device.arch, device.code_arch, device.processors, device.shared_bytes});
  return key;
}

// What a launch would compute.
struct ConvWork {
  int64_t blocks;
  double macs;  // multiply-adds of one block, what fills up tiles and steps included
};

// Nothing where the kernels do not take the problem.
std::optional<ConvWork> conv_forward_work(const CudaConv& c, const CudaDevice& device);
// y = pool(activation(conv(input, weight) + bias)); bias [K] and winner mask may be null.
void conv_forward(const CudaConv& c, const void* input, const void* weight, const void* bias, void* y,
                  void* winner_mask, void* stream);

std::optional<ConvWork> conv_grad_input_work(const CudaConv& c, const CudaDevice& device);
// turned [C, kh, kw, K]: turned[c, i, j, k] = weight[k, kh - 1 - i, kw - 1 - j, c].
void conv_grad_input(const CudaConv& c, const void* turned, const void* grad_y, const void* winner_mask,
                     void* grad_input, void* stream);

// The same two for MathMode::fma; the functions above call them.
std::optional<ConvWork> conv_forward_fma_work(const CudaConv& c, const CudaDevice& device);
void conv_forward_fma(const CudaConv& c, const void* input, const void* weight, const void* bias, void* y,
                      void* winner_mask, void* stream);
std::optional<ConvWork> conv_grad_input_fma_work(const CudaConv& c, const CudaDevice& device);
void conv_grad_input_fma(const CudaConv& c, const void* turned, const void* grad_y, const void* winner_mask,
                         void* grad_input, void* stream);

bool conv_grad_weight_fits(const CudaConv& c, const CudaDevice& device);
int64_t conv_grad_weight_workspace(const CudaConv& c, const CudaDevice& device);  // floats
// grad_weight [K, kh, kw, C] and, unless null, grad_bias [K]; summed in a fixed order, without atomics.
void conv_grad_weight(const CudaConv& c, const void* input, const void* grad_y, const void* winner_mask,
                      void* grad_weight, void* grad_bias, float* workspace, void* stream);

}  // namespace dlfast
