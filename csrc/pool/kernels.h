// The pass after a convolution, as each backend offers it to op.cpp. Tensors arrive as bare pointers that
// op.cpp has checked and allocated: dense, in the layout p.channels_last says, all of one dtype except the
// winner mask (see params.h). Any count may be zero.
#pragma once

#include "core/dtype.h"
#include "pool/params.h"

namespace dlfast {

struct PoolKernels {
  // y = pool(activation(z + bias)); bias [C] may be null; winner mask may be null where it is not wanted.
  // 16-bit dtypes are added and compared in float32 and rounded once.
  void (*forward)(const ReluPoolParams& p, Dtype dtype, const void* z, const void* bias, void* y,
                  void* winner_mask, void* stream);
  // grad_z from grad_y and winner mask, each element gathered once: deterministic for every window.
  void (*backward)(const ReluPoolParams& p, Dtype dtype, const void* grad_y, const void* winner_mask,
                   void* grad_z, void* stream);
  // The transpose of backward: grad_y from grad_z and winner mask.
  void (*transpose)(const ReluPoolParams& p, Dtype dtype, const void* grad_z, const void* winner_mask,
                    void* grad_y, void* stream);
};

const PoolKernels& pool_cpu();  // stream is ignored
#ifdef DLFAST_WITH_CUDA
const PoolKernels& pool_cuda();  // stream is a cudaStream_t of the current device

// grad_bias [C], summed in a fixed order, from grad_y and winner mask, or with average pooling from the dense
// gradient instead, winner mask being null. workspace: as many float32, or float64 for float64, as
// grad_bias_workspace says.
int64_t grad_bias_workspace(const ReluPoolParams& p);
void grad_bias_cuda(const ReluPoolParams& p, Dtype dtype, const void* grad, const void* winner_mask,
                    void* workspace, void* grad_bias, void* stream);
#endif

}  // namespace dlfast
