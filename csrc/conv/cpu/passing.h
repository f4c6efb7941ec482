// The positions that pass gradient: with max pooling at most one of each window, without pooling those whose
// gradient is not zero. Where there is much to multiply the backward kernels multiply these only; a dense
// gradient is mostly zeros.
#pragma once

#include "conv/cpu/kernels.h"
#include "core/level.h"
#include "pool/cpu/window.h"

namespace dlfast::DLFAST_LEVEL {

// One position that passes gradient, and the place it has for whoever listed it.
struct Live {
  float grad;
  int32_t at;
};

// Bit i of the result says whether bytes[i] is `value`, for i < count <= 64; on little-endian machines.
DLFAST_INLINE uint64_t equal_bytes(const uint8_t* bytes, int64_t count, uint8_t value) {
  constexpr uint64_t kOnes = 0x0101010101010101, kLow = 0x7f * kOnes;
  uint64_t result = 0;
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, bytes + i, std::min<int64_t>(8, count - i));
    const uint64_t x = eight ^ value * kOnes;
    const uint64_t zero = ~(((x & kLow) + kLow) | x | kLow);  // the upper bit of each byte that is 0
    result |= (zero >> 7) * 0x0102040810204080 >> 56 << i;    // together, the first byte's lowest
  }
  return count < 64 ? result & ((uint64_t{1} << count) - 1) : result;
}

// Positions of the convolution output that count, and where they lie in somebody's memory: (row, col) at
// (row - first_row) * row_step + (col - first_col) * col_step.
struct Region {
  int64_t first_row, last_row, first_col, last_col;
  int64_t row_step, col_step;

  DLFAST_INLINE int64_t at(int64_t row, int64_t col) const {
    return (row - first_row) * row_step + (col - first_col) * col_step;
  }
  DLFAST_INLINE bool holds(int64_t row, int64_t col) const {
    return (row >= first_row) & (row < last_row) & (col >= first_col) & (col < last_col);
  }
};

// The pooled gradient of a block, and the winner mask of max pooling, both channels_last: [N, PH, PW, K].
template <typename T>
class PooledGradient {
 public:
  PooledGradient(const ConvBlockParams& p, const T* grad, const uint8_t* winner_mask)
      : pool_(p.pool), grad_(grad), winner_mask_(winner_mask) {
    for (int32_t i = 0; i < 256; ++i) {
      is_position_[i] = i < pool_.window_positions() && i != kNoWinner<uint8_t>;
      row_[i] = is_position_[i] ? i / static_cast<int32_t>(pool_.window.size[1]) : 0;
      col_[i] = is_position_[i] ? i % static_cast<int32_t>(pool_.window.size[1]) : 0;
    }
  }

  const T* grad() const { return grad_; }
  const uint8_t* winner_mask() const { return winner_mask_; }
  // Where the numbers of a pooled pixel start in both.
  DLFAST_INLINE int64_t pixel(int64_t image, int64_t py, int64_t px) const {
    return ((image * pool_.output_size[0] + py) * pool_.output_size[1] + px) * pool_.channels;
  }

  // Calls put(k - first, at, gradient, passes) for the channels [first, last) of every pooled pixel of `rows`
  // and `cols`. Where nothing passes, or not within the region, `at` is that of some position of the region:
  // a caller that writes always and counts only what passes has no branch to mispredict.
  template <typename Put>
  DLFAST_INLINE void visit(int64_t image, const Span& rows, const Span& cols, int64_t first, int64_t last,
                           const Region& region, const Put& put) const {
    int32_t offset[256];  // of each winner mask from the corner of its window
    for (int i = 0; i < 256; ++i) {
      offset[i] = static_cast<int32_t>(row_[i] * region.row_step + col_[i] * region.col_step);
    }
    for (int64_t py = rows.begin; py < rows.end; ++py) {
      for (int64_t px = cols.begin; px < cols.end; ++px) {
        const int64_t first_number = pixel(image, py, px);
        const T* grads = grad_ + first_number;
        if (pool_.pool != Pool::max) {
          visit_unpooled(grads, first, last, region.holds(py, px), region.at(py, px), put);
          continue;
        }
        const uint8_t* winner_masks = winner_mask_ + first_number;
        const int64_t top = py * pool_.window.stride[0] - pool_.window.padding[0];
        const int64_t left = px * pool_.window.stride[1] - pool_.window.padding[1];
        const bool inside = region.holds(top, left) &&
                            region.holds(top + pool_.window.size[0] - 1, left + pool_.window.size[1] - 1);
        const int64_t corner = region.at(top, left);
        if (inside) {
          for (int64_t k = first; k < last; ++k) {
            const uint8_t winner_mask = winner_masks[k];
            put(k - first, corner + offset[winner_mask], static_cast<float>(grads[k]),
                is_position_[winner_mask]);
          }
          continue;
        }
        for (int64_t k = first; k < last; ++k) {
          const uint8_t winner_mask = winner_masks[k];
          const bool passes =
              is_position_[winner_mask] & region.holds(top + row_[winner_mask], left + col_[winner_mask]);
          put(k - first, passes ? corner + offset[winner_mask] : 0, static_cast<float>(grads[k]), passes);
        }
      }
    }
  }

 private:
  template <typename Put>
  DLFAST_INLINE void visit_unpooled(const T* grads, int64_t first, int64_t last, bool inside, int64_t at,
                                    const Put& put) const {
    if (!inside) return;
    for (int64_t k = first; k < last; ++k) {
      const float grad = static_cast<float>(grads[k]);
      put(k - first, at, grad, grad != 0.0f);
    }
  }

  const ReluPoolParams& pool_;
  const T* grad_;
  const uint8_t* winner_mask_;  // of max pooling
  bool is_position_[256];
  int32_t row_[256], col_[256];
};

}  // namespace dlfast::DLFAST_LEVEL
