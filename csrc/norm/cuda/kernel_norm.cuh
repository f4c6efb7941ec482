// Device bodies of a normalisation around the pass of conv_relu_pool: what it is before the activation, what
// it adds to the gradients of that pass, and the gradient without pooling. No Torch, no launch.
//
// Vectors are [C], aligned for packs where channels come in packs.
#pragma once

#include "pool/cuda/kernel_relu_pool_backward.cuh"
#include "pool/cuda/kernel_relu_pool_forward.cuh"

namespace dlfast {

// One rounding, so that every pass finds the same sign: nothing else tells where a ReLU let gradient pass.
DLFAST_DEVICE float affine(float z, float scale, float shift) {
  return __fmaf_rn(z, scale, shift);
}
DLFAST_DEVICE double affine(double z, double scale, double shift) {
  return __fma_rn(z, scale, shift);
}

// z * scale + shift, before the activation.
template <typename T>
struct Affine {
  static constexpr bool kHasMasks = false;
  using Acc = Accumulator<T>;
  const Acc* scale;
  const Acc* shift;

  template <int N>
  struct Values {
    Pack<Acc, N> scale, shift;
    DLFAST_DEVICE Acc of(int i, Acc z) const { return affine(z, scale.at[i], shift.at[i]); }
  };
  template <int N, typename Index>
  DLFAST_DEVICE Values<N> values(Index channel) const {
    return {load_pack<N>(scale + channel), load_pack<N>(shift + channel)};
  }
  DLFAST_DEVICE bool is_nothing() const { return false; }
};

// grad_z = g * scale + (z - mean) * by_z + offset, g the gradient of z * scale + shift; without the last two
// where by_z is null.
template <typename T>
struct NormGradient {
  using Acc = Accumulator<T>;
  const T* z;
  const Acc* scale;
  const Acc* mean;
  const Acc* by_z;
  const Acc* offset;

  template <int N>
  struct Values {
    Pack<Acc, N> scale, mean, by_z, offset;
    bool whole;
    DLFAST_DEVICE Acc of(int i, Acc g, Acc z) const {
      const Acc own = g * scale.at[i];
      return whole ? own + ((z - mean.at[i]) * by_z.at[i] + offset.at[i]) : own;
    }
  };
  template <int N, typename Index>
  DLFAST_DEVICE Values<N> values(Index channel) const {
    Values<N> v{.scale = load_pack<N>(scale + channel), .whole = by_z != nullptr};
    if (v.whole) {
      v.mean = load_pack<N>(mean + channel);
      v.by_z = load_pack<N>(by_z + channel);
      v.offset = load_pack<N>(offset + channel);
    }
    return v;
  }

  // As a Finish of the backward bodies, see AsItIs.
  template <Pool kPool, bool kAlong, int N, typename Index>
  DLFAST_DEVICE Pack<T, N> pack(const Acc (&sum)[N], uint32_t /*bits*/, Index at, Index channel) const {
    static_assert(kPool == Pool::max);
    const auto x = load_pack<N>(z + at);
    Pack<T, N> result;
    if constexpr (kAlong) {
      const auto v = values<1>(channel);
#pragma unroll
      for (int i = 0; i < N; ++i) result.at[i] = narrow<T>(v.of(0, sum[i], widen(x.at[i])));
    } else {
      // A few channels at a time: their vectors are four registers each.
      constexpr int M = N < 4 ? N : 4;
#pragma unroll
      for (int first = 0; first < N; first += M) {
        const auto v = values<M>(channel + first);
#pragma unroll
        for (int i = 0; i < M; ++i) {
          result.at[first + i] = narrow<T>(v.of(i, sum[first + i], widen(x.at[first + i])));
        }
      }
    }
    return result;
  }
};

// grad_z where nothing was pooled, or after average pooling has been undone: from g, the gradient after the
// activation, which may be grad_z itself.
template <typename T_, typename Index>
struct NormBackwardElementwise {
  using T = T_;
  using Acc = Accumulator<T>;
  static constexpr int N = kPackSize<T>;
  Index numel;
  ChannelWalk<Index> walk;
  bool aligned;   // z, g and grad_z
  bool in_packs;  // the vectors too, and no pack crosses the last channel
  bool relu;
  Affine<T> before;
  NormGradient<T> gradient;  // with z
  const T* g;
  T* grad_z;

  // Both kinds of vectors at once, for ChannelWalk.
  template <int M>
  struct Values {
    typename Affine<T>::template Values<M> before;
    typename NormGradient<T>::template Values<M> gradient;
  };
  template <int M>
  DLFAST_DEVICE Values<M> values(Index channel) const {
    return {before.template values<M>(channel), gradient.template values<M>(channel)};
  }
  template <int M>
  DLFAST_DEVICE T result(const Values<M>& v, int i, T g_at, T z_at) const {
    const Acc z = widen(z_at);
    const bool dead = relu && v.before.of(i, z) <= 0;
    return narrow<T>(v.gradient.of(i, dead ? Acc(0) : widen(g_at), z));
  }

  DLFAST_DEVICE void run(Thread thread, void* /*shared*/) const {
    const Index first = thread.global<Index>() * N;
    if (first >= numel) return;
    const int count = numel - first < N ? static_cast<int>(numel - first) : N;
    const T* z = gradient.z;
    if (!aligned || count < N) {
      walk.over(*this, first, count, [&](int i, const Values<1>& v) {
        grad_z[first + i] = result(v, 0, g[first + i], z[first + i]);
      });
      return;
    }
    const auto from = load_pack<N>(g + first);
    const auto x = load_pack<N>(z + first);
    Pack<T, N> to;
    if (in_packs) {
      constexpr int M = N < 4 ? N : 4;
      const Index channel = walk.by_channels.divide(first).remainder;
#pragma unroll
      for (int k = 0; k < N; k += M) {
        const auto v = values<M>(channel + k);
#pragma unroll
        for (int i = 0; i < M; ++i) to.at[k + i] = result(v, i, from.at[k + i], x.at[k + i]);
      }
    } else {
      walk.over(*this, first, N,
                [&](int i, const Values<1>& v) { to.at[i] = result(v, 0, from.at[i], x.at[i]); });
    }
    store_pack<N>(grad_z + first, to);
  }
};

}  // namespace dlfast
