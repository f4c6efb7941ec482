// How conv_grad_weight() cuts a problem into blocks and tiles. Host code, no Torch.
#pragma once

#include <optional>

#include "conv/cuda/kernel_grad_weight_tile.cuh"
#include "conv/cuda/kernels.h"

namespace dlfast::grad_weight {

// Which body multiplies, see kernel_grad_weight_products.cuh.
enum class Kind { tensor_slots, tensor_planes, tensor_planes_narrow, fma_slots, fma_planes };

struct Tiling {
  Kind kind;
  Params p;
  int64_t shared_bytes;

  int64_t blocks() const { return int64_t{p.blocks_outputs} * p.blocks_columns * p.splits; }
  int64_t split_pitch() const { return p.columns() * p.outputs + p.outputs; }
};

// Nothing where no way is known.
std::optional<Tiling> tiling_of(const CudaConv& c, const CudaDevice& device);

}  // namespace dlfast::grad_weight
