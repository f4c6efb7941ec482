// The CUDA body of an optimizer step: one block updates one unit of one tensor.
//
// One launch serves any number of tensors. Nothing is decided on the host that depends on device memory:
// found_inf, the loss scale, tensor learning rates and the step counters are read here. A step whose
// found_inf is not 0 writes nothing at all.
#pragma once

#include "common/portability.h"
#include "optim/step.h"

namespace dlfast::optim {

constexpr int kThreads = 256;
// Elements of a unit: four 16-byte accesses per thread and operand for float.
constexpr int kUnit = 4096;
constexpr int kPackBytes = 16;

// The hyper-parameters of a group, whatever the rule.
struct GroupRef {
  double numbers[kMaxHyper];
};

// The tensors of a launch, in kernel arguments (at most 4096 bytes of them) ...
template <int kTensors, int kGroups>
struct ArgumentTable {
  static constexpr int kMaxTensors = kTensors;
  static constexpr int kMaxGroups = kGroups;
  TensorRef tensors[kTensors];
  GroupRef groups[kGroups];
};

// ... or in device memory.
struct MemoryTable {
  const TensorRef* tensors;
  const GroupRef* groups;
};

struct StepScalars {
  int64_t count;            // tensors
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0
  unsigned* arrived;        // 0 between launches; null: no step counters are kept
  const GroupRef* groups;   // in device memory, in place of the table's; or null
};

template <typename Rule, typename Real>
struct BlockShared {
  typename Rule::template Constants<Real> constants;
  TensorRef tensor;
  bool last;
};

template <typename T>
struct Real {
  using type = T;
};
template <>
struct Real<__nv_bfloat16> {
  using type = float;
};
template <>
struct Real<__half> {
  using type = float;
};

__device__ __forceinline__ float to_real(float x) {
  return x;
}
__device__ __forceinline__ double to_real(double x) {
  return x;
}
__device__ __forceinline__ float to_real(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_real(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ void put(float& to, float x) {
  to = x;
}
__device__ __forceinline__ void put(double& to, double x) {
  to = x;
}
__device__ __forceinline__ void put(__nv_bfloat16& to, float x) {
  to = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void put(__half& to, float x) {
  to = __float2half_rn(x);
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// One access for a whole pack: left to itself the compiler stores the members one by one.
template <typename P>
__device__ __forceinline__ P load_pack(const P* from) {
  if constexpr (sizeof(P) == sizeof(uint4)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    P pack;
    memcpy(&pack, &bits, sizeof(P));
    return pack;
  } else {
    return *from;
  }
}

template <typename P>
__device__ __forceinline__ void store_pack(P* to, const P& pack) {
  if constexpr (sizeof(P) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(P));
    __stwb(reinterpret_cast<uint4*>(to), bits);
  } else {
    *to = pack;
  }
}

// Elements [i, i + kCount) of the unit that starts at `begin`; aligned to the pack's size.
template <typename Rule, typename T, int states, int kCount>
__device__ __forceinline__ void update_pack(
    const TensorRef& t, int64_t begin, int i,
    const typename Rule::template Constants<typename Real<T>::type>& c) {
  using P = Pack<T, kCount>;
  const int64_t at = begin + i;
  P* param_at = reinterpret_cast<P*>(static_cast<T*>(t.param) + at);
  P param = load_pack(param_at);
  const P grad = load_pack(reinterpret_cast<const P*>(static_cast<const T*>(t.grad) + at));
  P state[states > 0 ? states : 1];
#pragma unroll
  for (int k = 0; k < states; ++k)
    state[k] = load_pack(reinterpret_cast<const P*>(static_cast<T*>(t.state[k]) + at));
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    typename Real<T>::type p = to_real(param.at[j]);
    typename Real<T>::type s[states > 0 ? states : 1];
#pragma unroll
    for (int k = 0; k < states; ++k) s[k] = to_real(state[k].at[j]);
    Rule::template update<states>(p, to_real(grad.at[j]), s, c);
    put(param.at[j], p);
#pragma unroll
    for (int k = 0; k < states; ++k) put(state[k].at[j], s[k]);
  }
  store_pack(param_at, param);
#pragma unroll
  for (int k = 0; k < states; ++k)
    store_pack(reinterpret_cast<P*>(static_cast<T*>(t.state[k]) + at), state[k]);
}

template <typename Rule, typename T, int states>
__device__ __forceinline__ void update_unit(
    const TensorRef& t, int64_t begin, int thread,
    const typename Rule::template Constants<typename Real<T>::type>& c) {
  constexpr int kPack = kPackBytes / sizeof(T);
  static_assert(kUnit % (kPack * kThreads) == 0);
  const int64_t left = t.numel - begin;
  const int count = left < kUnit ? static_cast<int>(left) : kUnit;

  auto address = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad);
#pragma unroll
  for (int k = 0; k < states; ++k) address |= reinterpret_cast<uintptr_t>(t.state[k]);
  int packed = 0;
  if (address % kPackBytes == 0) {
    packed = count - count % kPack;
    for (int i = thread * kPack; i < packed; i += kThreads * kPack) {
      update_pack<Rule, T, states, kPack>(t, begin, i, c);
    }
  }
  for (int i = packed + thread; i < count; i += kThreads) update_pack<Rule, T, states, 1>(t, begin, i, c);
}

// With as many states as the tensor has.
template <typename Rule, typename T, int states>
__device__ __forceinline__ void update_unit_of(
    const TensorRef& t, int64_t begin, int thread,
    const typename Rule::template Constants<typename Real<T>::type>& c) {
  if constexpr (states > Rule::kMinStates) {
    if (t.state[states - 1] == nullptr) {
      update_unit_of<Rule, T, states - 1>(t, begin, thread, c);
      return;
    }
  }
  update_unit<Rule, T, states>(t, begin, thread, c);
}

// The tensor that holds `unit`: the last one whose first unit is not after it.
template <typename Table>
__device__ __forceinline__ int64_t find_tensor(const Table& table, int64_t count, int64_t unit) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (table.tensors[middle].first_unit <= unit ? low : high) = middle;
  }
  return low;
}

// Blocks [0, blocks) of one launch, each with kThreads threads.
template <typename Rule, typename T, typename Table>
__device__ __forceinline__ void step_block(const Table& table, const StepScalars& scalars, unsigned block,
                                           unsigned blocks, int thread,
                                           BlockShared<Rule, typename Real<T>::type>& shared) {
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) return;
  if (thread == 0) {
    shared.tensor = table.tensors[find_tensor(table, scalars.count, block)];
    typename Rule::Group group;
    const GroupRef* groups = scalars.groups == nullptr ? table.groups : scalars.groups;
    memcpy(&group, groups[shared.tensor.group].numbers, sizeof(group));
    const auto* taken = static_cast<const float*>(shared.tensor.step);
    const StepFacts facts{
        .step = taken == nullptr ? 1.0 : *taken + 1.0,
        .grad_factor = scalars.grad_scale == nullptr ? 1.0 : 1.0 / *scalars.grad_scale,
        .trust = 1,
    };
    shared.constants = Rule::template prepare<typename Real<T>::type>(group, facts);
    shared.last = false;
    if (scalars.arrived != nullptr) {
      // The counters may advance once every block has read them: the last block to come here does it.
      __threadfence();
      shared.last = atomicAdd(scalars.arrived, 1u) == blocks - 1;
      __threadfence();
      if (shared.last) atomicExch(scalars.arrived, 0u);
    }
  }
  __syncthreads();
  if (shared.last) {
    for (int64_t i = thread; i < scalars.count; i += kThreads) {
      auto* step = static_cast<float*>(table.tensors[i].step);
      if (step != nullptr) *step += 1;
    }
  }

  const TensorRef& t = shared.tensor;
  const int64_t begin = (static_cast<int64_t>(block) - t.first_unit) * kUnit;
  update_unit_of<Rule, T, Rule::kMaxStates>(t, begin, thread, shared.constants);
}

}  // namespace dlfast::optim
