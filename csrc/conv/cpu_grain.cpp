#include "conv/cpu_grain.h"

#include <algorithm>

namespace dlfast {
namespace {

// Half of a usual second-level cache, in floats; the other half is for weights and output.
constexpr double kUnitFloats = 64 * 1024;
// About a first-level cache.
constexpr double kStreamedFloats = 8 * 1024;
constexpr int64_t kUnitsPerThread = 4;

// Pooled rows of which the convolution rows, each of so many floats, make `floats`; at least one.
int64_t rows_within(const ConvBlockParams& p, double floats, double per_conv_row) {
  const double rows = floats / (per_conv_row * static_cast<double>(p.pool.window.stride[0]));
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(rows, 1e9)));
}

int64_t rows_for_balance(const ConvBlockParams& p, int64_t units) {
  return std::max<int64_t>(1, p.conv.batch * p.pool.output_size[0] / units);
}

}  // namespace

int64_t forward_grain(const ConvBlockParams& p, double floats_per_conv_row, int64_t threads) {
  const int64_t grain = std::min(rows_within(p, kUnitFloats, floats_per_conv_row),
                                 rows_for_balance(p, kUnitsPerThread * threads));
  // Whole tiles: a part of one costs as much.
  const int64_t stride = p.pool.window.stride[0];
  const int64_t rows = p.tile() % stride == 0 ? p.tile() / stride : p.tile();
  return (grain + rows - 1) / rows * rows;
}

int64_t grad_weight_grain(const ConvBlockParams& p, GradWeightKernel kernel, int64_t threads) {
  const int64_t pooled = std::min(p.pool.output_size[1], kGradWeightCols);
  const double cols = static_cast<double>(
      std::min((pooled - 1) * p.pool.window.stride[1] + p.pool.window.size[1], p.pool.input_size[1]));
  const double row = padded_length(p.conv, 1, cols) * p.conv.stride[0], channels = p.conv.group_in();
  // What the taps stream over: all channels, or a register of them.
  const double streamed = kernel == GradWeightKernel::channels ? conv_cpu().lanes : channels;
  const double near = kernel == GradWeightKernel::channels ? kStreamedFloats : kStreamedFloats / 2;
  // The rows of the first position under a kernel, and what its lists take, come before all others.
  const double all = channels + static_cast<double>(conv_cpu().lanes);
  const double first = padded_length(p.conv, 0, 1.0) * padded_length(p.conv, 1, cols) * all;
  return std::min({rows_within(p, near, row * streamed),
                   rows_within(p, kMostWorkspaceFloats - first,
                               row * all + 2.0 * cols * static_cast<double>(p.conv.group_out())),
                   rows_for_balance(p, kUnitsPerThread * threads)});
}

int64_t grad_input_grain(const ConvBlockParams& p, int64_t threads) {
  // Rows that reach into a neighbour's are listed by both; of eight few do.
  constexpr int64_t kRows = 8;
  int64_t rows = std::min(kRows, rows_for_balance(p, 2 * threads));
  const double step = static_cast<double>(p.pool.window.stride[0]) * p.conv.stride[0];
  while (rows > 1 && grad_input_floats(p, static_cast<double>(rows) * step) > kMostWorkspaceFloats) --rows;
  return rows;
}

}  // namespace dlfast
