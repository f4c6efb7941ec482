// How a tensor is cut for the walks of kernel_channel_sums.cuh, and their launches: start(body, blocks).
#pragma once

#include <algorithm>
#include <cstddef>

#include <c10/util/Exception.h>

#include "core/math.h"
#include "pool/cuda/kernel_channel_sums.cuh"
#include "pool/params.h"

namespace dlfast::channel_sums {

constexpr int64_t kLeastRows = 64;  // of a split
constexpr int64_t kPiece = 4096;    // elements, at least
constexpr int64_t kMostPieces = int64_t{1} << 30;

// Enough to fill any device, by sizes alone: results do not depend on the device.
struct Blocks {
  int64_t all, most_splits;
};

// The tensor that is walked through: z, or what was pooled.
struct Extent {
  int64_t outer, channels, inner;  // inner is 1 in channels_last
  Blocks blocks;

  Extent(const ReluPoolParams& p, const int64_t (&size)[2], Blocks blocks)
      : channels(p.channels), inner(p.channels_last ? 1 : size[0] * size[1]), blocks(blocks) {
    outer = p.batch * size[0] * size[1] / inner;
  }
  bool in_rows() const { return inner == 1; }
  // What packs lie along.
  int64_t along() const { return in_rows() ? channels : inner; }
  // Elements of a piece of a plane: so many that 32 bits number the pieces.
  int64_t piece() const {
    TORCH_CHECK(in_rows() || outer <= kMostPieces, "the CUDA kernels take at most ", kMostPieces,
                " images, got ", outer);
    int64_t size = kPiece;
    while (!in_rows() && outer * ceil_div(inner, size) > kMostPieces) size *= 2;
    return size;
  }
  int64_t pieces() const { return ceil_div(inner, piece()); }
  // Bounded from above, in whatever packs the channels come.
  int64_t splits() const {
    const int64_t units = in_rows() ? ceil_div(outer, kLeastRows) : ceil_div(outer * pieces(), kWarps);
    const int64_t groups = in_rows() ? ceil_div(channels, 256) : channels;
    return std::clamp<int64_t>(blocks.all / groups, 1, std::clamp<int64_t>(units, 1, blocks.most_splits));
  }
};

// Leaves partial [splits][C].
template <int N, typename Elements, typename Start>
void walk(const Extent& s, const Elements& elements, void* workspace, Start start) {
  auto* partial = static_cast<typename Elements::Left*>(workspace);
  const auto splits = static_cast<int32_t>(s.splits());
  if (s.in_rows()) {
    int32_t packs = 1;
    while (packs < 32 && int64_t{packs} * N < s.channels) packs *= 2;
    const int64_t groups = ceil_div(s.channels, int64_t{packs} * N);
    const OverRows<Elements, N> body{.elements = elements,
                                     .rows = s.outer,
                                     .channels = s.channels,
                                     .groups = static_cast<int32_t>(groups),
                                     .packs = packs,
                                     .splits = splits,
                                     .partial = partial};
    start(body, groups * splits);
  } else {
    const int64_t all = s.outer * s.pieces();
    const OverPlanes<Elements, N> body{.elements = elements,
                                       .inner = s.inner,
                                       .piece = s.piece(),
                                       .channels = static_cast<uint32_t>(s.channels),
                                       .pieces = static_cast<uint32_t>(s.pieces()),
                                       .all = static_cast<uint32_t>(all),
                                       .per_split = static_cast<uint32_t>(ceil_div(all, splits)),
                                       .partial = partial};
    start(body, s.channels * splits);
  }
}

}  // namespace dlfast::channel_sums
