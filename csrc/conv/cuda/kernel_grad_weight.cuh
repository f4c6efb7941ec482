// Device bodies of conv_grad_weight(): partial sums of grad_weight and grad_bias, which
// SumOfSplits of kernel_channel_sums.cuh adds up. No Torch, no launch. kernel_grad_weight_tile.cuh tells
// how a block works.
#pragma once

#include "conv/cuda/kernel_grad_weight_products.cuh"

namespace dlfast::grad_weight {

// partial [splits][K kh kw C + K]: what each split of the tiles adds to grad_weight and grad_bias.
template <typename Products>
struct PartialSums {
  using T = typename Products::T;
  using Loader = typename Products::Loader;
  Params p;
  const T* input;           // [N, H, W, C]
  const T* grad_y;          // [N, PH, PW, K]
  const void* winner_mask;  // [N, PH, PW, K]
  float* partial;

  DLFAST_DEVICE void run(uint32_t block, int32_t thread, unsigned char* shared) const {
    const unsigned char* zeros = clear(shared, thread);
    {
      const Share share(p, block);
      write_tables<T>(p, share, shared, thread);
      if (thread == 0) *reinterpret_cast<Share*>(shared + p.at_share) = share;
    }
    __syncthreads();
    // Read anew wherever it is needed, see again().
    const auto share = [&]() -> const Share& {
      return *reinterpret_cast<const Share*>(shared + again(p.at_share));
    };

    const auto* columns = reinterpret_cast<const ColumnEntry*>(shared + p.at_columns);
    Products products(p, WarpRole(p, thread), columns);
    GradientLoader<T> gradient(grad_y, winner_mask, thread);
    Loader patch(p, input, thread);
    const auto* pixels = reinterpret_cast<const PixelEntry*>(shared + p.at_pixels);
    const auto* positions = reinterpret_cast<const PositionEntry*>(shared + p.at_positions);
    const int32_t pixel_bytes =
        p.layout == PatchLayout::planes ? static_cast<int32_t>(sizeof(T)) : p.slot_pitch;
    const auto offsets_in = [&](int32_t side) {
      return reinterpret_cast<int32_t*>(shared + p.at_offsets) + side * p.pixels;
    };
    // The first time round there is a tile to load and none to multiply, the last time the other way round.
    for (int32_t next = share().first_tile; next <= share().last_tile; ++next) {
      const int32_t side = next & 1, other = 1 - side;
      const bool more = next < share().last_tile;
      unsigned char* next_patch = shared + p.at_patch + side * p.patch_bytes;
      if (more) {
        const Place place(p, next);
        gradient.fetch(p, share(), place);
        patch.fetch(p, share(), place, positions, next_patch);
        write_offsets(p, place, pixels, pixel_bytes, offsets_in(side), thread);
      }
      if (next > share().first_tile) {
        products.multiply(p, WarpRole(p, again(thread)),
                          {.gradient = shared + p.at_gradient + other * p.gradient_bytes,
                           .patch = shared + p.at_patch + other * p.patch_bytes,
                           .offsets = offsets_in(other)},
                          zeros);
      }
      if (more) {
        const Place place(p, next);
        gradient.stash(p, share(), place, shared + p.at_gradient + side * p.gradient_bytes,
                       reinterpret_cast<float*>(shared + p.at_bias) + thread);
        patch.stash(p, share(), place, positions, next_patch);
        copies_done();
      }
      __syncthreads();
    }
    finish(share(), products, shared, thread);
  }

 private:
  // Sums of this block to memory.
  DLFAST_DEVICE void finish(const Share& share, Products& products, unsigned char* shared,
                            int32_t thread) const {
    const WarpRole role(p, thread);
    const auto* columns = reinterpret_cast<const ColumnEntry*>(shared + p.at_columns);
    float* target = partial + share.split * (p.columns() * p.outputs + p.outputs);
    if (share.columns_block == 0) {
      sum_bias(share, reinterpret_cast<const float*>(shared + p.at_bias), target + p.columns() * p.outputs,
               thread);
    }
    sum_over_warps(products, reinterpret_cast<float*>(shared + p.at_gradient), thread);
    if (role.pixels == 0) store(share, role, products, columns, target);
  }

  // What no tile writes: gradients of pixels that rounding up added, sums of grad_bias. Returns zeros.
  DLFAST_DEVICE const unsigned char* clear(unsigned char* shared, int32_t thread) const {
    unsigned char* zeros = shared + p.at_patch + 2 * p.patch_bytes;
    auto* bias = reinterpret_cast<float*>(shared + p.at_bias) + thread;
    for (int i = 0; i < kPackSize<T>; ++i) bias[i * kBiasPitch<T>] = 0.0f;
    if (thread < kZeroBytes / 4) reinterpret_cast<uint32_t*>(zeros)[thread] = 0;
    const int32_t first = p.images * p.tile[0] * p.tile[1] * p.gradient_pitch;
    for (int32_t at = first + thread * 4; at < p.pixels * p.gradient_pitch; at += kThreads * 4) {
      for (int side = 0; side < 2; ++side) {
        *reinterpret_cast<uint32_t*>(shared + p.at_gradient + side * p.gradient_bytes + at) = 0;
      }
    }
    return zeros;
  }

  // Threads of one pack of outputs are block_outputs / pack apart.
  DLFAST_DEVICE void sum_bias(const Share& share, const float* bias, float* target, int32_t thread) const {
    constexpr int N = kPackSize<T>;
    if (thread >= p.block_outputs || share.first_output + thread >= p.outputs) return;
    const int32_t packs = p.block_outputs / N;
    float sum = 0;
    for (int32_t i = thread / N; i < kThreads; i += packs) sum += bias[thread % N * kBiasPitch<T> + i];
    target[share.first_output + thread] = sum;
  }

  // Adds up what warps of the same rows and columns have, halving their number, into the first.
  DLFAST_DEVICE void sum_over_warps(Products& products, float* exchange, int32_t thread) const {
    for (int32_t half = p.warps_pixels / 2; half > 0; half /= 2) {
      const int32_t threads = kThreads / p.warps_pixels * half;
      if (thread >= threads && thread < 2 * threads) {
#pragma unroll
        for (int i = 0; i < Products::kSums; ++i) exchange[i * threads + thread - threads] = products.sum(i);
      }
      __syncthreads();
      if (thread < threads) {
#pragma unroll
        for (int i = 0; i < Products::kSums; ++i) products.sum(i) += exchange[i * threads + thread];
      }
      __syncthreads();
    }
  }

  DLFAST_DEVICE void store(const Share& share, const WarpRole& role, Products& products,
                           const ColumnEntry* columns, float* target) const {
    const int32_t first_output = share.first_output + role.outputs * Products::kOutputs;
    const ColumnEntry* first_column = columns + role.columns * Products::kColumns;
#pragma unroll
    for (int i = 0; i < Products::kSums; ++i) {
      const int32_t output = first_output + products.row(i, role.lane);
      const int32_t column = first_column[products.column(i, role.lane)].target;
      if (output < p.outputs && column != kNone) target[output * p.columns() + column] = products.sum(i);
    }
  }
};

}  // namespace dlfast::grad_weight
