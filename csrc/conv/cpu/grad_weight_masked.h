// grad_weight of a layer with few input channels and a small kernel: every product is made, with the gradient
// where a position won its window and 0 elsewhere. A register holds several output channels, whose gradients
// lie together, so that nothing need be listed.
#pragma once

#include "conv/cpu/copy.h"
#include "conv/cpu/direct_forward.h"
#include "conv/cpu/grad_weight.h"
#include "conv/cpu/grad_weight_channels.h"
#include "conv/cpu/grad_weight_rows.h"
#include "conv/cpu/kernels.h"
#include "conv/cpu/passing.h"
#include "core/level.h"

namespace dlfast::DLFAST_LEVEL {

constexpr int64_t kMostMasked = 9;  // taps in registers at once

// The gradient of some output channels in a unit, and the input under it.
template <typename T>
struct MaskedRows {
  const T* grad;               // of the first pooled pixel
  const uint8_t* winner_mask;  // null without pooling
  int64_t rows, cols;          // pooled
  int64_t pixel, line;         // from one pooled pixel to the next, and from row to row, in numbers of grad
  int64_t channels;            // that exist, if fewer than a register holds
  const float* input;          // under the first tap of the first position
  int64_t across, down;        // the same in the input
  int64_t position[4];         // of a window's positions in the input
};

// Calls body(gradients of a window's positions, input under the window) for each pooled pixel.
template <int POSITIONS, typename T, typename Body>
DLFAST_INLINE void for_windows(const MaskedRows<T>& m, const Body& body) {
  using WinnerMasks = Vec<int32_t, kLanes>;
  for (int64_t y = 0; y < m.rows; ++y) {
    const float* x = m.input + y * m.down;
    int64_t at = y * m.line;
    for (int64_t i = 0; i < m.cols; ++i, at += m.pixel, x += m.across) {
      F g;
      Vec<uint8_t, kLanes> winner_mask{};
      if (m.channels >= kLanes) {
        g = load_compute<kLanes>(m.grad + at);
        if constexpr (POSITIONS > 1) winner_mask = load<Vec<uint8_t, kLanes>>(m.winner_mask + at);
      } else {
        T numbers[kLanes] = {};
        std::copy_n(m.grad + at, m.channels, numbers);
        g = load_compute<kLanes>(numbers);
        if constexpr (POSITIONS > 1) std::memcpy(&winner_mask, m.winner_mask + at, m.channels);
      }
      F passing[POSITIONS];
      if constexpr (POSITIONS == 1) {
        passing[0] = g;
      } else {
        const WinnerMasks won = convert_integers<WinnerMasks>(winner_mask);
        for (int q = 0; q < POSITIONS; ++q) passing[q] = won == q ? g : F{};
      }
      body(passing, x);
    }
  }
}

// grad [ROWS * LENGTH][kLanes] += sums of products, the rows of it `grad_row` and those of the input `row`
// apart; with BIAS, bias [m.channels] += the sums of the gradient.
template <int POSITIONS, int ROWS, int LENGTH, bool BIAS, typename T>
void add_masked(const MaskedRows<T>& m, int64_t row, float* grad, int64_t grad_row, float* bias) {
  F acc[ROWS][LENGTH] = {}, sum{};
  for_windows<POSITIONS>(m, [&](const F(&passing)[POSITIONS], const float* x) DLFAST_INLINE_LAMBDA {
    for (int q = 0; q < POSITIONS; ++q) {
      if (BIAS) sum += passing[q];
      const float* from = x + m.position[q];
      for (int r = 0; r < ROWS; ++r) {
        for (int i = 0; i < LENGTH; ++i) {
          acc[r][i] = broadcast<F>(from[r * row + i]) * passing[q] + acc[r][i];
        }
      }
    }
  });
  for (int r = 0; r < ROWS; ++r) {
    for (int i = 0; i < LENGTH; ++i) {
      float* to = grad + r * grad_row + i * kLanes;
      store(to, load<F>(to) + acc[r][i]);
    }
  }
  if (BIAS) {
    for (int64_t k = 0; k < std::min<int64_t>(m.channels, kLanes); ++k) bias[k] += sum[k];
  }
}

template <int POSITIONS, int LENGTH = 1, typename T>
void add_masked_any(int64_t length, const MaskedRows<T>& m, float* grad, float* bias) {
  if constexpr (LENGTH <= kMostMasked) {
    if (length == LENGTH && bias != nullptr)
      return add_masked<POSITIONS, 1, LENGTH, true>(m, 0, grad, 0, bias);
    if (length == LENGTH) return add_masked<POSITIONS, 1, LENGTH, false>(m, 0, grad, 0, bias);
    add_masked_any<POSITIONS, LENGTH + 1>(length, m, grad, bias);
  }
}

// packed [rows][cols][C]; own [block of kLanes output channels][kh][kw][C][kLanes].
struct MaskedPacking {
  const ConvBlockParams& p;
  GradWeightSizes sizes;
  int64_t taps, blocks;
  int64_t lists = 0, weight, input;  // floats

  explicit MaskedPacking(const ConvBlockParams& params) : p(params), sizes(params) {
    taps = p.conv.positions() * p.conv.group_in();
    blocks = (p.conv.group_out() + kLanes - 1) / kLanes;
    weight = p.conv.groups * blocks * taps * kLanes;
    input = packed_rows(p, sizes);
  }
  int64_t place(int64_t k, int64_t c, int64_t tap) const {
    return (k / kLanes * taps + tap * p.conv.group_in() + c) * kLanes + k % kLanes;
  }

  // Every product with a position that some window covers is made, so that infinities and NaN need no other
  // way; for the positions that none covers see op.cpp.
  template <typename T>
  bool pack(const Unit& unit, const T* from, float* packed) const {
    pack_rows(p, sizes, unit, from, packed);
    return true;
  }

  template <typename T>
  void accumulate(const PooledGradient<T>& gradient, const Unit& unit, const float* packed, float*,
                  float* own, float* bias) const {
    const PoolWindow& window = p.pool.window;
    const ConvParams& conv = p.conv;
    const int64_t down = conv.stride[0] * sizes.cols * conv.group_in(),
                  across = conv.stride[1] * conv.group_in();
    const int64_t first = gradient.pixel(unit.image, unit.pooled_rows.begin, unit.pooled_cols.begin) +
                          unit.group * conv.group_out();
    MaskedRows<T> m{};
    m.grad = gradient.grad() + first;
    m.winner_mask = gradient.winner_mask() == nullptr ? nullptr : gradient.winner_mask() + first;
    m.rows = unit.pooled_rows.end - unit.pooled_rows.begin;
    m.cols = unit.pooled_cols.end - unit.pooled_cols.begin;
    m.pixel = p.pool.channels;
    m.line = p.pool.output_size[1] * p.pool.channels;
    m.across = window.stride[1] * across;
    m.down = window.stride[0] * down;
    for (int64_t q = 0; q < p.pool.window_positions(); ++q) {
      m.position[q] = q / window.size[1] * down + q % window.size[1] * across;
    }
    m.input = packed;
    for (int64_t block = 0; block < blocks; ++block) {
      m.channels = std::min<int64_t>(kLanes, conv.group_out() - block * kLanes);
      float* grad = own + block * taps * kLanes;
      if (p.pool.pool == Pool::none) {
        add_block<1>(m, grad, bias + block * kLanes);
      } else {
        add_block<4>(m, grad, bias + block * kLanes);
      }
      m.grad += kLanes;
      if (m.winner_mask != nullptr) m.winner_mask += kLanes;
    }
  }

  template <int POSITIONS, typename T>
  void add_block(MaskedRows<T> m, float* grad, float* bias) const {
    const ConvParams& conv = p.conv;
    const int64_t channels = conv.group_in(), row = conv.dilation[0] * sizes.cols * channels;
    const bool together = conv.dilation[1] == 1;
    const int64_t per_row = together ? 1 : conv.kernel[1], length = conv.kernel[1] / per_row * channels;
    if (length == 3 && conv.kernel[0] == 3 && together) {
      return add_masked<POSITIONS, 3, 3, true>(m, row, grad, 3 * kLanes, bias);
    }
    const int64_t parts = (length + kMostMasked - 1) / kMostMasked;
    const float* input = m.input;
    for (int64_t r = 0; r < conv.kernel[0]; ++r) {
      for (int64_t s = 0; s < per_row; ++s) {
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t first = length * part / parts, count = length * (part + 1) / parts - first;
          m.input = input + r * row + s * conv.dilation[1] * channels + first;
          add_masked_any<POSITIONS>(count, m, grad + ((r * per_row + s) * length + first) * kLanes, bias);
          bias = nullptr;  // once is enough
        }
      }
    }
  }
};

int64_t grad_weight_workspace(const ConvBlockParams& p, GradWeightKernel kernel, int64_t threads) {
  return threads * (kernel == GradWeightKernel::masked ? slot_floats(MaskedPacking(p))
                    : kernel == GradWeightKernel::rows ? slot_floats(RowPacking(p))
                                                       : slot_floats(ChannelPacking(p)));
}

bool grad_weight(const ConvBlockParams& p, GradWeightKernel kernel, Dtype dtype, const void* input,
                 const void* grad_y, const uint8_t* winner_mask, void* grad_weight, void* grad_bias,
                 float* workspace) {
  return dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto with = [&](const auto& packing) {
      return grad_weight_with(p, packing, static_cast<const T*>(input), static_cast<const T*>(grad_y),
                              winner_mask, static_cast<T*>(grad_weight), static_cast<T*>(grad_bias),
                              workspace);
    };
    if (kernel == GradWeightKernel::masked) return with(MaskedPacking(p));
    return kernel == GradWeightKernel::rows ? with(RowPacking(p)) : with(ChannelPacking(p));
  });
}

}  // namespace dlfast::DLFAST_LEVEL
