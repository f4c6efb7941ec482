// How conv_grad_weight() fills shared memory: the expanded gradient and the input patch of a tile, and which
// pixels exist. No Torch, no launch.
//
// Every loader has two halves: fetch() starts reading the next tile, into registers or by asynchronous
// copies, before a tile is multiplied, and stash() writes to shared memory what is in registers, after.
#pragma once

#include <cstring>

#include "conv/cuda/kernel_grad_weight_tile.cuh"
#include "core/pack.h"
#include "core/tensor_core.h"

namespace dlfast::grad_weight {

// 16 bytes from global to shared memory: asynchronous where the device can, finished after copies_done().
DLFAST_DEVICE void copy_16(void* to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  copy_async_16(shared_address(to), from, valid);
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

DLFAST_DEVICE void copies_done() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  copy_commit();
  copy_wait<0>();
#endif
}

// x, in a way that keeps what is computed from it out of registers while a tile is multiplied: compilers
// would compute it once for all tiles.
DLFAST_DEVICE int32_t again(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Up to kPackSize<T> neighbours, of which `count` exist, and zeros. In one access where that is allowed.
template <typename T>
DLFAST_DEVICE Pack<T, kPackSize<T>> load_some(const T* from, int32_t count, bool in_pack) {
  constexpr int N = kPackSize<T>;
  Pack<T, N> pack;
  if (in_pack && count > 0) return load_pack<N>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = i < count ? from[i] : narrow<T>(0.0f);
  return pack;
}

// ---- WinnerMasks, four in a word
// ----------------------------------------------------------------------------

// Bit 7 of every byte says that this winner mask is another than `position`.
DLFAST_DEVICE uint32_t differing(uint32_t winner_masks, uint32_t position) {
  const uint32_t x = winner_masks ^ (position * 0x01010101u);
  return ((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x;
}

// Ones in all bits of the numbers of word `w` of a pack whose winner mask has bit 7 set.
template <typename T>
DLFAST_DEVICE uint32_t spread_signs(const uint32_t (&signs)[kPackSize<T> / 4], int w) {
  // Selectors with bit 3 set repeat the sign of a byte.
  const uint32_t from = signs[sizeof(T) == 2 ? w / 2 : 0];
  const uint32_t selector =
      sizeof(T) == 2 ? (w % 2 == 0 ? 0x9988u : 0xbbaau) : 0x8888u + 0x1111u * static_cast<uint32_t>(w);
  uint32_t result;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(from), "r"(selector));
  return result;
}

// N winner_masks in the first words of `winner_masks`; kNoWinner for those beyond `count`.
template <int N>
DLFAST_DEVICE void load_winner_mask(const uint8_t* from, int32_t count, bool in_pack,
                                    uint32_t (&winner_masks)[N / 4]) {
  if (in_pack && count > 0) {
    const auto pack = load_pack<N / 4>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
    for (int i = 0; i < N / 4; ++i) winner_masks[i] = pack.at[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < N / 4; ++i) winner_masks[i] = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t shift = 8 * (i % 4);
    if (i < count) winner_masks[i / 4] &= ~(0xffu << shift) | static_cast<uint32_t>(from[i]) << shift;
  }
}

// Sums of grad_bias lie in shared memory by number in the pack, and this many floats on, by thread: neither
// those who add nor those who sum them up in the end meet in a bank.
template <typename T>
constexpr int32_t kBiasPitch = kThreads + 32 / kPackSize<T>;

// ---- The gradient -------------------------------------------------------------------------------------

// A window's gradients for a pack of outputs, and the winner_masks of winners.
template <typename T>
struct Window {
  static constexpr int kWinnerMaskWords = kPackSize<T> / 4;
  uint32_t grad[4];
  uint32_t winner_mask[kWinnerMaskWords];
};

// A thread expands windows of one pack of outputs, the same in all tiles.
template <typename T>
class GradientLoader {
  static constexpr int N = kPackSize<T>;

 public:
  DLFAST_DEVICE GradientLoader(const T* grad_y, const void* winner_mask, int32_t thread)
      : grad_y_(grad_y), winner_mask_(winner_mask), thread_(thread) {}

  // The first window is on its way while another tile is multiplied; with 2x2 pooling there are no more.
  DLFAST_DEVICE void fetch(const Params& p, const Share& share, const Place& place) {
    const Work work(p, again(thread_));
    ahead_ = load(p, share, place, work.first, work.pack);
  }

  // bias: the first of this thread's sums.
  DLFAST_DEVICE void stash(const Params& p, const Share& share, const Place& place, unsigned char* gradient,
                           float* bias) const {
    const Work work(p, again(thread_));
    const int32_t windows = p.images * p.windows[0] * p.windows[1];
    if (work.first < windows) expand(p, share, place, ahead_, work.first, work.pack, gradient, bias);
#pragma unroll 1
    for (int32_t w = work.first + work.step; w < windows; w += work.step) {
      expand(p, share, place, load(p, share, place, w, work.pack), w, work.pack, gradient, bias);
    }
  }

 private:
  // Windows first, first + step, ... of the tile, and a pack of outputs.
  struct Work {
    int32_t pack, first, step;

    DLFAST_DEVICE Work(const Params& p, int32_t thread)
        : pack(thread & ((1 << p.log_output_packs) - 1)),
          first(thread >> p.log_output_packs),
          step(kThreads >> p.log_output_packs) {}
  };
  struct Where {
    int32_t image, row, column;  // of a window in the tile
  };
  DLFAST_DEVICE static Where where(const Params& p, int32_t window) {
    const auto column = p.by_windows[1].divide(static_cast<uint32_t>(window));
    const auto row = p.by_windows[0].divide(column.quotient);
    return {static_cast<int32_t>(row.quotient), static_cast<int32_t>(row.remainder),
            static_cast<int32_t>(column.remainder)};
  }

  // Where the window's gradients are, and how many of the pack exist: none of a window that does not.
  struct Source {
    int64_t offset;
    int32_t count;
  };
  DLFAST_DEVICE Source source(const Params& p, const Share& share, const Place& place, const Where& at,
                              int32_t pack) const {
    const int32_t output = share.first_output + pack * N;
    const int32_t image = place.image + at.image;
    const int32_t row = place.window_row + at.row, column = place.window_column + at.column;
    const bool exists = at.image < p.images && image < p.batch && row < p.pooled[0] && column < p.pooled[1];
    return {((int64_t{image} * p.pooled[0] + row) * p.pooled[1] + column) * p.outputs + output,
            exists ? p.outputs - output : 0};
  }

  DLFAST_DEVICE Window<T> load(const Params& p, const Share& share, const Place& place, int32_t window,
                               int32_t pack) const {
    const Source from = source(p, share, place, where(p, window), pack);
    Window<T> result{};
    const auto grad = load_some(grad_y_ + from.offset, from.count, p.packs_of_outputs);
    memcpy(result.grad, &grad, sizeof(grad));
    if (p.passing == Passing::winners) {
      load_winner_mask<N>(static_cast<const uint8_t*>(winner_mask_) + from.offset, from.count,
                          p.packs_of_outputs, result.winner_mask);
    }
    return result;
  }

  DLFAST_DEVICE static void add_to_bias(const Share& share, const uint32_t (&words)[4], float* bias) {
    if (share.columns_block != 0) return;  // others do
    Pack<T, N> pack;
    memcpy(&pack, words, sizeof(pack));
#pragma unroll
    for (int i = 0; i < N; ++i) bias[i * kBiasPitch<T>] += widen(pack.at[i]);
  }

  // Every pixel of the window, in shared memory: its gradient where it won, else zero.
  DLFAST_DEVICE void expand(const Params& p, const Share& share, const Place& place, const Window<T>& w,
                            int32_t window, int32_t pack, unsigned char* gradient, float* bias) const {
    const Where at = where(p, window);
    unsigned char* to =
        gradient + pack * 16 +
        ((at.image * p.tile[0] + at.row * p.window_stride[0]) * p.tile[1] + at.column * p.window_stride[1]) *
            p.gradient_pitch;
    uint32_t words[4];
    if (p.passing == Passing::winners) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = w.grad[i] & ~spread_signs<T>(w.winner_mask, i);
      add_to_bias(share, words, bias);
#pragma unroll 1
      for (int32_t dy = 0; dy < p.window_stride[0]; ++dy) {
#pragma unroll 1
        for (int32_t dx = 0; dx < p.window_stride[1]; ++dx) {
          const bool inside = dy < p.window[0] && dx < p.window[1];
          // No winner mask says 127: windows have fewer positions.
          const auto position = static_cast<uint32_t>(inside ? dy * p.window[1] + dx : 127);
          uint32_t other[Window<T>::kWinnerMaskWords];
#pragma unroll
          for (int i = 0; i < Window<T>::kWinnerMaskWords; ++i)
            other[i] = differing(w.winner_mask[i], position);
#pragma unroll
          for (int i = 0; i < 4; ++i) words[i] = w.grad[i] & ~spread_signs<T>(other, i);
          *reinterpret_cast<uint4*>(to + (dy * p.tile[1] + dx) * p.gradient_pitch) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
      return;
    }
    memcpy(words, w.grad, sizeof(words));
    if (p.passing == Passing::positive) {
      const Source from = source(p, share, place, at, pack);
      const auto y =
          load_some(static_cast<const T*>(winner_mask_) + from.offset, from.count, p.packs_of_outputs);
      Pack<T, N> grad;
      memcpy(&grad, w.grad, sizeof(grad));
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (widen(y.at[i]) <= 0.0f) grad.at[i] = narrow<T>(0.0f);
      }
      memcpy(words, &grad, sizeof(words));
    }
    add_to_bias(share, words, bias);
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }

  const T* grad_y_;
  const void* winner_mask_;
  int32_t thread_;
  Window<T> ahead_;
};

// ---- The patch ----------------------------------------------------------------------------------------

// A position of the patch on the input.
struct InputSite {
  int64_t offset;  // of its first channel
  bool exists;     // or is padding, or an image too many

  DLFAST_DEVICE InputSite(const Params& p, const Place& place, PositionEntry entry) {
    const int32_t image = place.image + (entry.slot >> 20);
    const int32_t row = place.row * p.stride[0] - p.padding[0] + (entry.where >> 16);
    const int32_t column = place.column * p.stride[1] - p.padding[1] + (entry.where & 0xffff);
    exists = image < p.batch && static_cast<uint32_t>(row) < static_cast<uint32_t>(p.in[0]) &&
             static_cast<uint32_t>(column) < static_cast<uint32_t>(p.in[1]);
    offset = ((int64_t{image} * p.in[0] + row) * p.in[1] + column) * p.channels;
  }
};

DLFAST_DEVICE int32_t slot_in(PositionEntry entry) {
  return entry.slot & 0xfffff;
}

// [slot][channel].
template <typename T>
class SlotsLoader {
  static constexpr int N = kPackSize<T>;

 public:
  DLFAST_DEVICE SlotsLoader(const Params& /*p*/, const T* input, int32_t thread)
      : input_(input), thread_(thread) {}

  DLFAST_DEVICE void fetch(const Params& p, const Share& share, const Place& place,
                           const PositionEntry* positions, unsigned char* patch) {
    if (p.packs_of_channels) fill<true>(p, share, place, positions, patch);
  }
  DLFAST_DEVICE void stash(const Params& p, const Share& share, const Place& place,
                           const PositionEntry* positions, unsigned char* patch) const {
    if (!p.packs_of_channels) fill<false>(p, share, place, positions, patch);
  }

 private:
  template <bool kPacks>
  DLFAST_DEVICE void fill(const Params& p, const Share& share, const Place& place,
                          const PositionEntry* positions, unsigned char* patch) const {
    const int32_t thread = again(thread_), pack = thread & ((1 << p.log_channel_packs) - 1);
    const int32_t channel = share.first_channel + pack * N;
    const int32_t step = kThreads >> p.log_channel_packs;
#pragma unroll 1
    for (int32_t i = thread >> p.log_channel_packs; i < p.positions(); i += step) {
      const PositionEntry entry = positions[i];
      const InputSite site(p, place, entry);
      const int32_t count = site.exists ? p.channels - channel : 0;
      void* to = patch + slot_in(entry) * p.slot_pitch + pack * 16;
      if constexpr (kPacks) {
        copy_16(to, input_ + (count > 0 ? site.offset + channel : 0), count > 0);
      } else {
        *static_cast<Pack<T, N>*>(to) = load_some(input_ + site.offset + channel, count, false);
      }
    }
  }

  const T* input_;
  int32_t thread_;
};

// [channel][slot], for the few channels of a first layer. Numbers of 16 bits lie there twice, the second
// time one slot earlier, so that the word of two neighbouring pixels begins at a whole word for any tap.
template <typename T>
class PlanesLoader {
  static constexpr int kAhead = 3;

 public:
  DLFAST_DEVICE PlanesLoader(const Params& p, const T* input, int32_t thread)
      : input_(input), thread_(thread), count_(p.positions() * p.channels) {}

  DLFAST_DEVICE void fetch(const Params& p, const Share& /*share*/, const Place& place,
                           const PositionEntry* positions, unsigned char* /*patch*/) {
    const int32_t thread = again(thread_);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead_[i] = load(p, place, positions, thread + i * kThreads);
  }
  DLFAST_DEVICE void stash(const Params& p, const Share& /*share*/, const Place& place,
                           const PositionEntry* positions, unsigned char* patch) const {
    const int32_t thread = again(thread_);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) store(p, positions, patch, thread + i * kThreads, ahead_[i]);
#pragma unroll 1
    for (int32_t i = thread + kAhead * kThreads; i < count_; i += kThreads) {
      store(p, positions, patch, i, load(p, place, positions, i));
    }
  }

 private:
  DLFAST_DEVICE T load(const Params& p, const Place& place, const PositionEntry* positions, int32_t i) const {
    if (i >= count_) return narrow<T>(0.0f);
    const auto at = p.by_channels.divide(static_cast<uint32_t>(i));  // neighbours in memory
    const InputSite site(p, place, positions[at.quotient]);
    return site.exists ? input_[site.offset + at.remainder] : narrow<T>(0.0f);
  }
  DLFAST_DEVICE void store(const Params& p, const PositionEntry* positions, unsigned char* patch, int32_t i,
                           T value) const {
    if (i >= count_) return;
    const auto at = p.by_channels.divide(static_cast<uint32_t>(i));
    const int32_t slot = slot_in(positions[at.quotient]);
    unsigned char* plane = patch + at.remainder * p.plane_pitch;
    reinterpret_cast<T*>(plane)[slot] = value;
    if (sizeof(T) == 2 && slot > 0) reinterpret_cast<T*>(plane + p.copy_pitch)[slot - 1] = value;
  }

  const T* input_;
  int32_t thread_, count_;
  T ahead_[kAhead];
};

// ---- Which pixels exist -------------------------------------------------------------------------------

// Where each pixel of a tile has its numbers in the patch, in bytes, of its plane or of all. The sign says
// that it lies beyond the convolution output: it must meet no input, not even where the gradient there is
// zero, because zero times NaN is NaN.
constexpr int32_t kMissing = INT32_MIN;

DLFAST_DEVICE void write_offsets(const Params& p, const Place& place, const PixelEntry* pixels, int32_t pitch,
                                 int32_t* offsets, int32_t thread) {
  for (int32_t i = again(thread); i < p.pixels; i += kThreads) {
    const PixelEntry entry = pixels[i];
    const bool exists = entry.where >= 0 && place.image + (entry.where >> 24) < p.batch &&
                        place.row + (entry.where >> 12 & 0xfff) < p.pixels_of[0] &&
                        place.column + (entry.where & 0xfff) < p.pixels_of[1];
    offsets[i] = entry.slot * pitch | (exists ? 0 : kMissing);
  }
}

}  // namespace dlfast::grad_weight
