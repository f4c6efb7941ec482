// Numbers from memory to registers and back, as the lanes of a CUDA warp share them out.
//
// A warp works on a block of kCount numbers per lane. A lane takes kWidth neighbours in one access, where the
// block is whole and its arrays are aligned, and the warp 32 times as many without a gap; elsewhere it takes
// them one by one.
#pragma once

#include "optim/cuda/kernel_table.cuh"

namespace dlfast::optim {

template <int bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = unsigned char;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

template <typename T, int kCount>
struct Pack {
  T at[kCount];
};

// One access for a whole pack: left to itself the compiler moves the members one by one.
template <typename P>
DLFAST_DEVICE P load_pack(const void* base, int64_t bytes) {
  using Word = typename WordOf<sizeof(P)>::type;
  const Word word = *reinterpret_cast<const Word*>(static_cast<const char*>(base) + bytes);
  P pack;
  memcpy(&pack, &word, sizeof(P));
  return pack;
}

template <typename P>
DLFAST_DEVICE void store_pack(void* base, int64_t bytes, const P& pack) {
  using Word = typename WordOf<sizeof(P)>::type;
  Word word;
  memcpy(&word, &pack, sizeof(P));
  __stwb(reinterpret_cast<Word*>(static_cast<char*>(base) + bytes), word);
}

// The part of one lane of a warp's block that starts at element `first` and has `count` elements.
template <int kCount, int kWidth>
struct Lane {
  static_assert(kCount % kWidth == 0);
  static constexpr int kNumbers = kCount;
  int64_t first;
  int count, lane;
  bool wide;  // whole and aligned

  DLFAST_DEVICE int element(int i) const { return (i / kWidth * kWarp + lane) * kWidth + i % kWidth; }
  DLFAST_DEVICE bool has(int i) const { return wide || element(i) < count; }

  // Calls f(number of the lane, first byte of it in an array of T, how many) with a constant `how many`.
  template <typename T, typename F>
  DLFAST_DEVICE void for_accesses(F&& f) const {
    using One = std::integral_constant<int, 1>;
    using All = std::integral_constant<int, kWidth>;
    const int64_t at = (first + lane * kWidth) * static_cast<int64_t>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kCount; i += kWidth) {
      const int64_t bytes = at + i * static_cast<int>(kWarp * sizeof(T));
      if (kWidth > 1 && wide) {
        f(i, bytes, All{});
        continue;
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (has(i + j)) f(i + j, bytes + j * static_cast<int>(sizeof(T)), One{});
      }
    }
  }

  // to[i] = convert(number); 0 where the lane has none.
  template <typename T, typename Real, typename Convert>
  DLFAST_DEVICE void load(const void* base, Real* to, Convert&& convert) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = 0;
    for_accesses<T>([&](int i, int64_t bytes, auto width) {
      const auto pack = load_pack<Pack<T, width>>(base, bytes);
#pragma unroll
      for (int j = 0; j < width; ++j) to[i + j] = convert(pack.at[j]);
    });
  }

  template <typename T, typename From, typename Convert>
  DLFAST_DEVICE void store(void* base, const From* from, Convert&& convert) const {
    for_accesses<T>([&](int i, int64_t bytes, auto width) {
      Pack<T, width> pack;
#pragma unroll
      for (int j = 0; j < width; ++j) pack.at[j] = convert(from[i + j], i + j);
      store_pack(base, bytes, pack);
    });
  }

  template <typename T>
  DLFAST_DEVICE void load(const void* base, Accumulator<T>* to) const {
    load<T>(base, to, [](T x) { return widen(x); });
  }

  template <typename T>
  DLFAST_DEVICE void store(void* base, const Accumulator<T>* from) const {
    store<T>(base, from, [](Accumulator<T> x, int) { return narrow<T>(x); });
  }

  template <typename T>
  DLFAST_DEVICE void clear(void* base) const {
    for_accesses<T>([&](int, int64_t bytes, auto width) {
      constexpr Pack<char, width * sizeof(T)> kZeros = {};
      store_pack(base, bytes, kZeros);
    });
  }
};

// 16 random bits for each number of a warp's block, through shared memory: a lane's numbers come from the
// counters of eight lanes.
struct WarpRandom {
  uint16_t* shared;  // [kCodeBlock], of the warp
  uint64_t seed, step;
  uint32_t tensor;

  template <typename Lane>
  DLFAST_DEVICE void draw(const Lane& lane, uint32_t slot) const {
    constexpr int kCounters = 8;  // of a tile
    const int tile = lane.lane / kCounters, l = lane.lane % kCounters;
    const auto first_tile = static_cast<uint64_t>(lane.first) / kRandomTile;
    const auto block = random_words<uint32_t>(seed, step, random_stream(tensor, slot), first_tile + tile, l);
    __syncwarp();  // the draws before are used
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint16_t* to = shared + tile * kRandomTile + 2 * w * kCounters + l;
      to[0] = static_cast<uint16_t>(block.word[w]);
      to[kCounters] = static_cast<uint16_t>(block.word[w] >> 16);
    }
    __syncwarp();
  }

  template <typename Lane>
  DLFAST_DEVICE uint32_t of(const Lane& lane, int i) const {
    return shared[lane.element(i)];
  }
};

// ---- code8: a warp's block is a block of codes
// --------------------------------------------------------------

template <bool is_signed, typename Lane>
DLFAST_DEVICE void load_codes(const Lane& lane, const void* base, const float* scales, float* to) {
  using Code = Code8<is_signed>;
  const float unit = scales[lane.first / kCodeBlock] / Code::kTop;
  lane.template load<uint8_t>(base, to, [&](uint8_t c) { return Code::template decode<float>(c) * unit; });
}

template <bool is_signed, int kCount, int kWidth>
DLFAST_DEVICE void store_codes(const Lane<kCount, kWidth>& lane, const float* from, const WarpRandom& random,
                               bool at_random, void* base, float* scales) {
  using Code = Code8<is_signed>;
  static_assert(kCount * kWarp == kCodeBlock);
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (lane.has(i)) largest = maximum(largest, from[i] < 0 ? -from[i] : from[i]);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    largest = maximum(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  const float scale = Code::scale(largest);
  const float inverse = Code::inverse(scale);
  lane.template store<uint8_t>(base, from, [&](float x, int i) {
    const uint32_t draw = at_random ? random.of(lane, i) : Code::kMiddle;
    return static_cast<uint8_t>(Code::encode(x, inverse, draw, at_random ? Code::kDither : 0));
  });
  __syncwarp();  // all lanes have read the scale before
  if (lane.lane == 0) scales[lane.first / kCodeBlock] = scale;
}

// ---- By format --------------------------------------------------------------------------------------------

template <typename Lane>
DLFAST_DEVICE void load_as(const Lane& lane, Format format, const void* base, const float* scales,
                           float* to) {
  switch (format) {
    case Format::bfloat16:
      return lane.template load<__nv_bfloat16>(base, to);
    case Format::float16:
      return lane.template load<__half>(base, to);
    case Format::code8_signed:
      return load_codes<true>(lane, base, scales, to);
    case Format::code8_unsigned:
      return load_codes<false>(lane, base, scales, to);
    default:
      return lane.template load<float>(base, to);
  }
}

DLFAST_DEVICE __nv_bfloat16 round_at_random(float x, uint32_t random, __nv_bfloat16) {
  return __ushort_as_bfloat16(static_cast<unsigned short>(random_bfloat16(x, random)));
}

DLFAST_DEVICE __half round_at_random(float x, uint32_t random, __half) {
  return __ushort_as_half(static_cast<unsigned short>(random_float16(x, random)));
}

template <typename T, typename Lane>
DLFAST_DEVICE void store_halves(const Lane& lane, const float* from, const WarpRandom& random, bool at_random,
                                void* base) {
  lane.template store<T>(base, from, [&](float x, int i) {
    return at_random ? round_at_random(x, random.of(lane, i), T{}) : narrow<T>(x);
  });
}

// Where `at_random`, draws the numbers of `slot`.
template <typename Lane>
DLFAST_DEVICE void store_as(const Lane& lane, Format format, const float* from, const WarpRandom& random,
                            bool at_random, uint32_t slot, void* base, float* scales) {
  if (at_random) random.draw(lane, slot);
  switch (format) {
    case Format::bfloat16:
      return store_halves<__nv_bfloat16>(lane, from, random, at_random, base);
    case Format::float16:
      return lane.template store<__half>(base, from);
    case Format::code8_signed:
      return store_codes<true>(lane, from, random, at_random, base, scales);
    case Format::code8_unsigned:
      return store_codes<false>(lane, from, random, at_random, base, scales);
    default:
      return lane.template store<float>(base, from);
  }
}

}  // namespace dlfast::optim
