// Asynchronous copies, matrix loads and tensor-core products, under the names kernels use. Device code only.
//
// Fragments are those of mma.m16n8k16 in the PTX ISA. With g = lane / 4 and q = lane % 4:
//   accumulator [16 x 8]   rows g, g, g + 8, g + 8 at columns 2q, 2q + 1, 2q, 2q + 1
//   a [16 x 32 bytes]      32-bit words (row g, word q), (g + 8, q), (g, q + 4), (g + 8, q + 4)
//   b [32 bytes x 8]       words (word q, column g), (q + 4, g)
// One step along k is 32 bytes for every type: 16 numbers of 16 bits (mma.m16n8k16) or 8 of float32
// (mma.m16n8k8.tf32, whose fragments hold the same words). So addresses depend on bytes alone.
#pragma once

#include "core/portability.h"

namespace dlfast {

// Whether this pass of the compiler is for an architecture that has all of this (sm_80 and later).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DLFAST_TENSOR_CORES 1
#endif

constexpr int kStepBytes = 32;  // along k, of one product

DLFAST_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

#ifdef DLFAST_TENSOR_CORES

// 16 bytes from global to shared memory; zeros, and nothing is read, where not `valid`.
DLFAST_DEVICE void copy_async_16(uint32_t to, const void* from, bool valid) {
  const uint32_t bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

DLFAST_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
DLFAST_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8, and gets word
// lane % 4 of row lane / 4 of each.
DLFAST_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// The same of matrices of 8 x 8 numbers of 16 bits, transposed on the way.
DLFAST_DEVICE void load_matrices_transposed(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// float32 words as tensor cores take them: rounded to 10 bits of mantissa, to nearest.
template <int N>
DLFAST_DEVICE void round_to_tf32(uint32_t (&words)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(words[i]) : "f"(__uint_as_float(words[i])));
  }
}

// acc += a b, in float32.
template <typename T>
DLFAST_DEVICE void multiply_add(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define DLFAST_MMA(INSTRUCTION)                                                               \
  asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <>
DLFAST_DEVICE void multiply_add<__half>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  DLFAST_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
DLFAST_DEVICE void multiply_add<__nv_bfloat16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  DLFAST_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
// Words rounded by round_to_tf32.
template <>
DLFAST_DEVICE void multiply_add<float>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  DLFAST_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef DLFAST_MMA

#endif  // sm_80

}  // namespace dlfast
