// grad_weight of a layer with few input channels: a register holds several taps. The input patch under every
// position of the convolution output is gathered first, once for all output channels.
#pragma once

namespace dlfast::DLFAST_LEVEL {

constexpr int kTapVectors = kLanes == 16 ? 24 : 12;  // in registers at once
constexpr int kMaxTaps = 400;                        // beyond, the patches outgrow the cache

// grad [TAPS registers] += sum over the list of gradient * patch.
template <int TAPS>
DLFAST_INLINE void stream_patches(const Live* list, const Live* end, const float* patches, float* grad) {
  // Several positions in flight, so that the latency of the multiply-adds of one is hidden by the others.
  constexpr int FLIGHT = TAPS >= 8 ? 1 : TAPS >= 4 ? 2 : 4;
  F acc[FLIGHT][TAPS] = {};
  const auto add = [&](F(&to)[TAPS], const Live& live) DLFAST_INLINE_LAMBDA {
    const F g = broadcast<F>(live.grad);
    const float* patch = patches + live.at;
    for (int t = 0; t < TAPS; ++t) to[t] = g * load<F>(patch + t * kLanes) + to[t];
  };
  for (; end - list >= FLIGHT; list += FLIGHT) {
    for (int f = 0; f < FLIGHT; ++f) add(acc[f], list[f]);
  }
  for (; list != end; ++list) add(acc[0], *list);
  for (int t = 0; t < TAPS; ++t) {
    F sum = acc[0][t];
    for (int f = 1; f < FLIGHT; ++f) sum += acc[f][t];
    store(grad + t * kLanes, load<F>(grad + t * kLanes) + sum);
  }
}

template <int TAPS = 1>
void stream_patches_any(int64_t taps, const Live* list, const Live* end, const float* patches, float* grad) {
  if constexpr (TAPS <= kTapVectors) {
    if (taps == TAPS) return stream_patches<TAPS>(list, end, patches, grad);
    return stream_patches_any<TAPS + 1>(taps, list, end, patches, grad);
  }
}

// packed: the padded input [rows][cols][C] and a register, then the patches [conv_rows * conv_cols][patch];
// own [K][patch], a patch being [kh][kw][C] and zeros up to whole registers.
struct PatchPacking {
  const ConvBlockParams& p;
  GradWeightSizes sizes;
  int64_t tap_vectors, patch;  // registers and floats of a patch
  int64_t row_step, col_step;  // of a convolution position among the patches
  int64_t weight, input;       // floats

  explicit PatchPacking(const ConvBlockParams& params) : p(params), sizes(params) {
    tap_vectors = (p.conv.positions() * p.conv.group_in() + kLanes - 1) / kLanes;
    patch = tap_vectors * kLanes;
    row_step = sizes.conv_cols * patch;
    col_step = patch;
    weight = p.conv.out_channels * patch;
    input = padded() + sizes.conv_rows * sizes.conv_cols * patch + kLanes;
  }
  // With room to read a register beyond its end.
  int64_t padded() const { return sizes.rows * sizes.cols * p.conv.group_in() + kLanes; }
  int64_t per_slot() const {
    return round_up(sizes.ends + sizes.lists + sizes.bias + weight + input, 2);  // pointers stay aligned
  }
  int64_t place(int64_t k, int64_t c, int64_t tap) const { return k * patch + tap * p.conv.group_in() + c; }

  template <typename T>
  bool pack(const Unit& unit, const T* from, float* packed) const {
    const ConvParams& conv = p.conv;
    const auto [stride_n, stride_c, stride_h, stride_w] = p.input_strides;
    const int64_t channels = conv.group_in(), cols = sizes.cols;
    const int64_t begin = std::clamp<int64_t>(-unit.in_left, 0, cols);
    const int64_t end = std::clamp<int64_t>(conv.input_size[1] - unit.in_left, begin, cols);
    float doubt = 0.0f;
    for (int64_t r = 0; r < sizes.rows; ++r) {
      float* to = packed + r * cols * channels;
      const int64_t y = unit.in_top + r;
      std::fill_n(to, cols * channels, 0.0f);
      if (y < 0 || y >= conv.input_size[0]) continue;
      const T* row = from + unit.image * stride_n + unit.group * channels * stride_c + y * stride_h +
                     (unit.in_left + begin) * stride_w;
      to += begin * channels;
      if (stride_c == 1 && stride_w == channels) {
        convert(row, (end - begin) * channels, to);
      } else {
        transpose_rows(row, stride_c, stride_w, channels, end - begin, to);
      }
      for (int64_t i = 0; i < (end - begin) * channels; ++i) doubt += to[i] * 0.0f;
    }
    gather(packed, packed + padded());
    return doubt == 0.0f;
  }

  void gather(const float* padded_input, float* patches) const {
    const ConvParams& conv = p.conv;
    const int64_t channels = conv.group_in(), row = sizes.cols * channels;
    const bool together = conv.dilation[1] == 1 || conv.kernel[1] == 1;
    const int64_t runs = together ? 1 : conv.kernel[1], length = conv.kernel[1] * channels / runs;
    for (int64_t y = 0; y < sizes.conv_rows; ++y) {
      for (int64_t x = 0; x < sizes.conv_cols; ++x) {
        const float* from = padded_input + y * conv.stride[0] * row + x * conv.stride[1] * channels;
        float* to = patches + (y * sizes.conv_cols + x) * patch;
        float* const end = to + patch;
        for (int64_t r = 0; r < conv.kernel[0]; ++r) {
          for (int64_t s = 0; s < runs; ++s) {
            const float* run = from + r * conv.dilation[0] * row + s * conv.dilation[1] * channels;
            // Whole registers, beyond the end of a run: the next run or patch is written after it.
            for (int64_t i = 0; i < length; i += kLanes) store(to + i, load<F>(run + i));
            to += length;
          }
        }
        std::fill(to, end, 0.0f);
      }
    }
  }

  // All taps, as many at a time as registers hold, in passes of even size.
  void accumulate(const Live* lists, Live* const* ends, const float* packed, float* own) const {
    const float* patches = packed + padded();
    const int64_t passes = (tap_vectors + kTapVectors - 1) / kTapVectors;
    for (int64_t k = 0; k < p.conv.group_out(); ++k) {
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = tap_vectors * pass / passes, last = tap_vectors * (pass + 1) / passes;
        stream_patches_any(last - first, lists + k * sizes.capacity, ends[k], patches + first * kLanes,
                           own + k * patch + first * kLanes);
      }
    }
  }
};

int64_t grad_weight_scratch(const ConvBlockParams& p, bool patches, int64_t threads) {
  return threads * (patches ? PatchPacking(p).per_slot() : ChannelPacking(p).per_slot());
}

bool grad_weight(const ConvBlockParams& p, bool patches, Dtype dtype, const void* input, const void* grad_y,
                 const uint8_t* code, void* grad_weight, void* grad_bias, float* scratch) {
  return dispatch_block(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto with = [&](const auto& packing) {
      return grad_weight_with(p, packing, static_cast<const T*>(input), static_cast<const T*>(grad_y), code,
                              static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), scratch);
    };
    return patches ? with(PatchPacking(p)) : with(ChannelPacking(p));
  });
}

}  // namespace dlfast::DLFAST_LEVEL
