// grad_bias of the epilogue path on CUDA: launches of the kernels in kernel_channel_sums.cuh.
//
// A pass of its own rather than a part of the one that expands the gradient: that one is there in a dozen
// shapes, of which several see a pooled element more than once, while this reads each once, 3 bytes of it in
// a 16-bit type with pooling, where summing the dense gradient of 2x2 windows would read 8.
#include <algorithm>

#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "common/launch_check.h"
#include "conv_relu_pool/kernel_channel_sums.cuh"
#include "conv_relu_pool/relu_pool.h"

namespace dlfast {
namespace channel_sums {
namespace {

// 64 registers a thread. Left to itself, ptxas aims at more blocks for some bodies and spills a few bytes.
constexpr int kBlocksPerSm = 4;

// inspect: registers 64, dynamic 8192
// inspect for Sum\w+<__\w+, 8>|Sum\w+<float, 4>: holds LDG.128
template <typename Body>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    channel_sums_kernel(const __grid_constant__ Body body) {
  extern __shared__ __align__(16) unsigned char shared[];
  body.run(blockIdx.x, static_cast<int32_t>(threadIdx.x), shared);
}

template <typename Body>
void launch(const Body& body, int64_t blocks, int64_t numbers, void* stream) {
  channel_sums_kernel<<<static_cast<unsigned>(blocks), kThreads,
                        static_cast<size_t>(numbers) * sizeof(typename Body::Acc),
                        static_cast<cudaStream_t>(stream)>>>(body);
  check_launch([&] {
    return c10::str("in the kernel of ", c10::demangle_type<Body>(), ", ", blocks, " blocks of ", kThreads,
                    " threads");
  });
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Enough to fill any device, by sizes alone: results do not depend on the device.
constexpr int64_t kBlocks = 1024;
constexpr int64_t kLeastRows = 64;    // of a split
constexpr int64_t kMostSplits = 512;  // what the second kernel adds up
constexpr int64_t kPiece = 4096;      // elements, at least
constexpr int64_t kMostPieces = int64_t{1} << 30;

// What a sum is taken of: grad_y and code, or with average pooling the dense gradient alone.
struct Source {
  int64_t outer, channels, inner;  // inner is 1 in channels_last
  Code code;

  explicit Source(const ReluPoolParams& p) {
    const int64_t(&size)[2] = p.pool == Pool::avg ? p.input_size : p.output_size;
    channels = p.channels;
    inner = p.channels_last ? 1 : size[0] * size[1];
    outer = p.batch * size[0] * size[1] / inner;
    code = p.pool == Pool::max                ? (p.wide_code() ? Code::wide : Code::narrow)
           : p.pool == Pool::avg              ? Code::none
           : p.activation == Activation::relu ? Code::y
                                              : Code::none;
  }

  // Elements of a piece of a plane: so many that 32 bits number the pieces.
  int64_t piece() const {
    TORCH_CHECK(outer <= kMostPieces, "the CUDA kernels take at most ", kMostPieces, " images, got ", outer);
    int64_t size = kPiece;
    while (outer * ceil_div(inner, size) > kMostPieces) size *= 2;
    return size;
  }
  int64_t pieces() const { return ceil_div(inner, piece()); }
  // Bounded from above, in whatever packs the channels come.
  int64_t splits() const {
    const int64_t units = inner == 1 ? ceil_div(outer, kLeastRows) : ceil_div(outer * pieces(), kWarps);
    const int64_t groups = inner == 1 ? ceil_div(channels, 256) : channels;
    return std::clamp<int64_t>(kBlocks / groups, 1, std::clamp<int64_t>(units, 1, kMostSplits));
  }
};

bool aligned_to(size_t bytes, const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename T, int N>
void run(const Source& s, const void* grad, const void* code, void* scratch, void* grad_bias, void* stream) {
  using Acc = Accumulator<T>;
  auto* partial = static_cast<Acc*>(scratch);
  const auto splits = static_cast<int32_t>(s.splits());
  if (s.inner == 1) {
    int32_t packs = 1;
    while (packs < 32 && int64_t{packs} * N < s.channels) packs *= 2;
    const int64_t groups = ceil_div(s.channels, int64_t{packs} * N);
    const SumChannelsLast<T, N> body{.rows = s.outer,
                                     .channels = s.channels,
                                     .groups = static_cast<int32_t>(groups),
                                     .packs = packs,
                                     .splits = splits,
                                     .kind = s.code,
                                     .grad = static_cast<const T*>(grad),
                                     .code = code,
                                     .partial = partial};
    launch(body, groups * splits, int64_t{kThreads} * N, stream);
  } else {
    const int64_t all = s.outer * s.pieces();
    const SumPlanes<T, N> body{.inner = s.inner,
                               .piece = s.piece(),
                               .channels = static_cast<uint32_t>(s.channels),
                               .pieces = static_cast<uint32_t>(s.pieces()),
                               .all = static_cast<uint32_t>(all),
                               .per_split = static_cast<uint32_t>(ceil_div(all, splits)),
                               .kind = s.code,
                               .grad = static_cast<const T*>(grad),
                               .code = code,
                               .partial = partial};
    launch(body, s.channels * splits, kThreads, stream);
  }
  const SumOfSplits<T> sum{.count = s.channels,
                           .second_count = 0,
                           .pitch = s.channels,
                           .splits = splits,
                           .partial = partial,
                           .result = static_cast<T*>(grad_bias),
                           .second = nullptr};
  launch(sum, sum.blocks(), kThreads, stream);
}

template <typename T>
void run_aligned(const Source& s, const void* grad, const void* code, void* scratch, void* grad_bias,
                 void* stream) {
  constexpr int N = kPackSize<T>;
  const int64_t along = s.inner == 1 ? s.channels : s.inner;
  const size_t code_bytes = s.code == Code::narrow ? N : 16;
  const bool packs = along % N == 0 && aligned_to(16, grad) && aligned_to(code_bytes, code);
  return packs ? run<T, N>(s, grad, code, scratch, grad_bias, stream)
               : run<T, 1>(s, grad, code, scratch, grad_bias, stream);
}

}  // namespace
}  // namespace channel_sums

int64_t grad_bias_scratch(const ReluPoolParams& p) {
  return channel_sums::Source(p).splits() * p.channels;
}

void grad_bias_cuda(const ReluPoolParams& p, Dtype dtype, const void* grad, const void* code, void* scratch,
                    void* grad_bias, void* stream) {
  const channel_sums::Source source(p);
  switch (dtype) {
    case Dtype::float32:
      return channel_sums::run_aligned<float>(source, grad, code, scratch, grad_bias, stream);
    case Dtype::float64:
      return channel_sums::run_aligned<double>(source, grad, code, scratch, grad_bias, stream);
    case Dtype::bfloat16:
      return channel_sums::run_aligned<__nv_bfloat16>(source, grad, code, scratch, grad_bias, stream);
    case Dtype::float16:
      return channel_sums::run_aligned<__half>(source, grad, code, scratch, grad_bias, stream);
  }
}

}  // namespace dlfast
