// The products of one tile in conv_grad_weight(): sums over its pixels of gradient times patch, in the
// registers of a warp. No Torch, no launch.
//
//   TensorSlots    tensor cores, patch [slot][channel]: matrix loads that transpose, pixels are rows
//   TensorPlanes   tensor cores, patch [channel][slot]: a word is a pair of neighbouring pixels of a plane
//   Fma            ordinary arithmetic, either patch
//
// A warp has kOutputs rows and kColumns columns of the product. The sums of a thread are numbered 0 ..
// kSums - 1; row(i) and column(i) say which they are.
#pragma once

#include "conv/cuda/kernel_grad_weight_load.cuh"

namespace dlfast::grad_weight {

// A tile in shared memory.
struct View {
  const unsigned char* gradient;
  const unsigned char* patch;
  const int32_t* offsets;
};

// Which of the warps along each; those that share rows and columns take turns with the pixels.
struct WarpRole {
  int32_t lane, pixels, outputs, columns;

  DLFAST_DEVICE WarpRole(const Params& p, int32_t thread) {
    const int32_t warp = thread / 32;
    lane = thread % 32;
    outputs = warp & ((1 << p.log_warps_outputs) - 1);
    columns = warp >> p.log_warps_outputs & ((1 << p.log_warps_columns) - 1);
    pixels = warp >> (p.log_warps_outputs + p.log_warps_columns);
  }
};

// Zeros that missing pixels meet: one for each bank, so that they come from the bank where the pixel would
// be.
constexpr int kZeroBytes = 128;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// Step `step` of the gradient, transposed: rows are outputs, k are pixels. See tensor_core.h.
template <typename T, int kFragments>
DLFAST_DEVICE void load_gradient(uint32_t (&a)[kFragments][4], const unsigned char* gradient, int32_t pitch,
                                 int32_t step, int32_t lane) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    if constexpr (sizeof(T) == 2) {
      const int32_t pixel = step * 16 + lane / 16 * 8 + lane % 8;
      load_matrices_transposed(a[m], shared_address(gradient + pixel * pitch + m * 32 + lane / 8 % 2 * 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t pixel = step * 8 + lane % 4 + i / 2 * 4;
        a[m][i] = *reinterpret_cast<const uint32_t*>(gradient + pixel * pitch +
                                                     (m * 16 + i % 2 * 8 + lane / 4) * 4);
      }
      round_to_tf32(a[m]);
    }
  }
}

#endif

template <typename T>
constexpr int kStepPixels = kStepBytes / static_cast<int>(sizeof(T));

template <typename T_>
class TensorSlots {
 public:
  using T = T_;
  using Loader = SlotsLoader<T>;
  static constexpr int kOutputs = 32, kGroups = 9, kColumns = kGroups * 8;  // 3x3 taps of eight channels
  static constexpr int kFragments = kOutputs / 16;
  static constexpr int kSums = kFragments * kGroups * 4;

  DLFAST_DEVICE TensorSlots(const Params& /*p*/, const WarpRole& role, const ColumnEntry* columns) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      // Of 16-bit numbers one load brings two groups of eight columns, by half of the lanes each.
      const int32_t group = sizeof(T) == 2 ? min(2 * j + role.lane / 16, kGroups - 1) : j;
      offset_[j] = columns[role.columns * kColumns + group * 8].offset;
      if (sizeof(T) == 4) offset_[j] += role.lane / 4 * 4;
    }
  }

  DLFAST_DEVICE float& sum(int i) { return sum_[i / 4 / kGroups][i / 4 % kGroups][i % 4]; }
  DLFAST_DEVICE int32_t row(int i, int32_t lane) const {
    return i / 4 / kGroups * 16 + i % 4 / 2 * 8 + lane / 4;
  }
  DLFAST_DEVICE int32_t column(int i, int32_t lane) const {
    return i / 4 % kGroups * 8 + lane % 4 * 2 + i % 2;
  }

  DLFAST_DEVICE void multiply(const Params& p, const WarpRole& role, const View& view,
                              const unsigned char* zeros) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned char* gradient = view.gradient + role.outputs * kOutputs * static_cast<int32_t>(sizeof(T));
    const int32_t steps = p.pixels / kStepPixels<T>, lane = role.lane;
#pragma unroll 1
    for (int32_t step = role.pixels; step < steps; step += p.warps_pixels) {
      uint32_t a[kFragments][4];
      load_gradient<T>(a, gradient, p.gradient_pitch, step, lane);
      if constexpr (sizeof(T) == 2) {
        const int32_t offset = view.offsets[step * 16 + lane % 16];
        const uint32_t patch = shared_address(view.patch), none = shared_address(zeros);
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          uint32_t b[4];
          const auto at = static_cast<uint32_t>(offset + offset_[j]);
          load_matrices_transposed(b, offset >= 0 ? patch + at : none | (at & (kZeroBytes - 16)));
#pragma unroll
          for (int m = 0; m < kFragments; ++m) {
            multiply_add<T>(sum_[m][2 * j], a[m], b[0], b[1]);
            if (2 * j + 1 < kGroups) multiply_add<T>(sum_[m][2 * j + 1], a[m], b[2], b[3]);
          }
        }
      } else {
        const int32_t* offsets = view.offsets + step * 8 + lane % 4;
        const int32_t offset[2] = {offsets[0], offsets[4]};
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          uint32_t b[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int32_t at = offset[i] + offset_[j];
            const unsigned char* from = offset[i] >= 0 ? view.patch + at : zeros + (at & (kZeroBytes - 4));
            b[i] = *reinterpret_cast<const uint32_t*>(from);
          }
          round_to_tf32(b);
#pragma unroll
          for (int m = 0; m < kFragments; ++m) multiply_add<T>(sum_[m][j], a[m], b[0], b[1]);
        }
      }
    }
#else
    __trap();
#endif
  }

 private:
  static constexpr int kLoads = sizeof(T) == 2 ? (kGroups + 1) / 2 : kGroups;
  int32_t offset_[kLoads];
  float sum_[kFragments][kGroups][4] = {};
};

template <typename T_, int kFragments_>
class TensorPlanes {
 public:
  using T = T_;
  using Loader = PlanesLoader<T>;
  static constexpr int kFragments = kFragments_, kOutputs = kFragments * 16;
  static constexpr int kGroups = 4, kColumns = kGroups * 8;  // 27 of them are those of 3x3 taps of RGB
  static constexpr int kSums = kFragments * kGroups * 4;

  DLFAST_DEVICE TensorPlanes(const Params& p, const WarpRole& role, const ColumnEntry* columns) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      offset_[j] = columns[role.columns * kColumns + j * 8 + role.lane / 4].offset;
      // An odd slot is the even one before it in the shifted copy.
      if (sizeof(T) == 2 && offset_[j] % 4 != 0) offset_[j] += p.copy_pitch - 2;
    }
  }

  DLFAST_DEVICE float& sum(int i) { return sum_[i / 4 / kGroups][i / 4 % kGroups][i % 4]; }
  DLFAST_DEVICE int32_t row(int i, int32_t lane) const {
    return i / 4 / kGroups * 16 + i % 4 / 2 * 8 + lane / 4;
  }
  DLFAST_DEVICE int32_t column(int i, int32_t lane) const {
    return i / 4 % kGroups * 8 + lane % 4 * 2 + i % 2;
  }

  DLFAST_DEVICE void multiply(const Params& p, const WarpRole& role, const View& view,
                              const unsigned char* /*zeros*/) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned char* gradient = view.gradient + role.outputs * kOutputs * static_cast<int32_t>(sizeof(T));
    const int32_t steps = p.pixels / kStepPixels<T>, lane = role.lane;
#pragma unroll 1
    for (int32_t step = role.pixels; step < steps; step += p.warps_pixels) {
      uint32_t a[kFragments][4];
      load_gradient<T>(a, gradient, p.gradient_pitch, step, lane);
      uint32_t mask[2];
      const unsigned char* pixel[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int32_t offset;
        if constexpr (sizeof(T) == 2) {
          const auto pair = *reinterpret_cast<const int2*>(view.offsets + step * 16 + i * 8 + lane % 4 * 2);
          mask[i] = (pair.x >= 0 ? 0xffffu : 0u) | (pair.y >= 0 ? 0xffff0000u : 0u);
          offset = pair.x;
        } else {
          offset = view.offsets[step * 8 + i * 4 + lane % 4];
          mask[i] = offset >= 0 ? 0xffffffffu : 0u;
        }
        pixel[i] = view.patch + (offset & ~kMissing);
      }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b[i] = *reinterpret_cast<const uint32_t*>(pixel[i] + offset_[j]) & mask[i];
        if constexpr (sizeof(T) == 4) round_to_tf32(b);
#pragma unroll
        for (int m = 0; m < kFragments; ++m) multiply_add<T>(sum_[m][j], a[m], b[0], b[1]);
      }
    }
#else
    __trap();
#endif
  }

 private:
  int32_t offset_[kGroups];
  float sum_[kFragments][kGroups][4] = {};
};

template <typename T_, typename Loader_>
class Fma {
 public:
  using T = T_;
  using Loader = Loader_;
  static constexpr int kOutputs = 64, kColumns = 32;
  static constexpr int kSums = 64;  // of 8 rows, in packs, and 8 columns, 4 apart

  DLFAST_DEVICE Fma(const Params& /*p*/, const WarpRole& role, const ColumnEntry* columns) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      offset_[j] = columns[role.columns * kColumns + j * 4 + role.lane / 8].offset;
    }
  }

  DLFAST_DEVICE float& sum(int i) { return sum_[i / 8][i % 8]; }
  DLFAST_DEVICE int32_t row(int i, int32_t lane) const {
    return i / 8 / N * 8 * N + lane % 8 * N + i / 8 % N;
  }
  DLFAST_DEVICE int32_t column(int i, int32_t lane) const { return i % 8 * 4 + lane / 8; }

  DLFAST_DEVICE void multiply(const Params& p, const WarpRole& role, const View& view,
                              const unsigned char* /*zeros*/) {
    const unsigned char* gradient = view.gradient + role.outputs * kOutputs * static_cast<int32_t>(sizeof(T));
    const int32_t lane = role.lane;
#pragma unroll 1
    for (int32_t pixel = role.pixels; pixel < p.pixels; pixel += p.warps_pixels) {
      const int32_t offset = view.offsets[pixel];
      if (offset < 0) continue;
      float a[8];
#pragma unroll
      for (int i = 0; i < 8 / N; ++i) {
        const auto pack = *reinterpret_cast<const Pack<T, N>*>(gradient + pixel * p.gradient_pitch +
                                                               (i * 8 + lane % 8) * 16);
#pragma unroll
        for (int k = 0; k < N; ++k) a[i * N + k] = widen(pack.at[k]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float b = widen(*reinterpret_cast<const T*>(view.patch + (offset + offset_[j])));
#pragma unroll
        for (int i = 0; i < 8; ++i) sum_[i][j] += a[i] * b;
      }
    }
  }

 private:
  static constexpr int N = kPackSize<T>;
  int32_t offset_[8];
  float sum_[8][8] = {};
};

}  // namespace dlfast::grad_weight
