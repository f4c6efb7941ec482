// grad_weight and grad_bias of a layer with few input channels, from the pooled gradient and the code.
//
// A window passes its gradient to one position, so at most a quarter (2x2) of the convolution output counts.
// Per output channel the positions that pass are listed first; then the taps of the kernel lie in registers
// while the list streams by: one multiply-add per register of taps, no branch inside.
#pragma once

namespace dlfast::DLFAST_LEVEL {

constexpr int kTapVectors = kLanes == 16 ? 24 : 12;  // in registers at once
constexpr int kMaxTaps = 256;                        // beyond, the patches outgrow the cache

// What a slot (one thread's share of the images) needs; all in floats.
struct PatchScratch {
  int64_t tap_vectors, patch;  // patch: floats of one input patch, whole registers
  int64_t grad_weight, grad_bias, input, patches, live;

  explicit PatchScratch(const ConvBlockParams& p) {
    const Bands bands(p);
    const int64_t taps = p.conv.kernel[0] * p.conv.kernel[1] * p.conv.in_channels;
    tap_vectors = (taps + kLanes - 1) / kLanes;
    patch = tap_vectors * kLanes;
    grad_weight = p.conv.out_channels * patch;
    grad_bias = p.conv.out_channels;
    input = bands.input_floats();
    patches = bands.conv_rows * bands.conv_cols * patch;
    live = 2 * bands.pooled_rows * p.pool.output_size[1];
  }
  int64_t per_slot() const { return grad_weight + grad_bias + input + patches + live; }
};

int64_t grad_weight_patches_scratch(const ConvBlockParams& p, int64_t threads) {
  return threads * PatchScratch(p).per_slot();
}

// patches [conv_rows * conv_cols][patch]: the input under every convolution position of a band.
inline void gather_patches(const ConvBlockParams& p, const Bands& bands, const Band& band, const Taps& taps,
                           int64_t patch, const float* packed, float* patches) {
  const int64_t step_x = p.conv.stride[1] * p.conv.in_channels, step_y = p.conv.stride[0] * bands.row_stride;
  for (int64_t y = 0; y < band.conv_rows; ++y) {
    for (int64_t x = 0; x < bands.conv_cols; ++x) {
      float* to = patches + (y * bands.conv_cols + x) * patch;
      float* const end = to + patch;
      for (int64_t r = 0; r < taps.rows; ++r) {
        for (int64_t s = 0; s < taps.per_row; ++s) {
          const float* from = packed + y * step_y + x * step_x + r * taps.row_step + s * taps.col_step;
          for (int64_t i = 0; i < taps.length; ++i) *to++ = from[i];
        }
      }
      std::fill(to, end, 0.0f);
    }
  }
}

// The positions of channel k in the band that pass gradient; returns how many, and adds up their gradient.
inline int64_t list_live(const ConvBlockParams& p, const Bands& bands, const Band& band, int64_t k,
                         const float* grad_y, const void* code, Live* live, float* grad_sum) {
  const ReluPoolParams& pool = p.pool;
  const int64_t pooled_width = pool.output_size[1], plane = pool.output_size[0] * pooled_width;
  const int64_t start = (band.image * p.conv.out_channels + k) * plane + band.first_pooled * pooled_width;
  const uint8_t* codes = static_cast<const uint8_t*>(code) + start;
  const float* outputs = static_cast<const float*>(code) + start;
  const float* grads = grad_y + start;
  const bool by_code = pool.pool == Pool::max;
  int32_t offsets[256] = {};  // of a position in its window, in patches; a table, since dividing is slow
  for (int64_t at = 0; by_code && at < pool.window_positions(); ++at) {
    offsets[at] = static_cast<int32_t>(at / pool.window.size[1] * bands.conv_cols + at % pool.window.size[1]);
  }
  const bool rectified = pool.activation == Activation::relu;

  // A code that somebody made up must not lead outside of the patches.
  const auto patches = static_cast<uint64_t>(band.conv_rows * bands.conv_cols);
  int64_t count = 0;
  float sum = 0.0f;
  for (int64_t py = 0; py < band.pooled_rows; ++py) {
    const int64_t top =
        (band.first_pooled + py) * pool.window.stride[0] - pool.window.padding[0] - band.first_conv;
    for (int64_t px = 0; px < pooled_width; ++px) {
      const int64_t i = py * pooled_width + px;
      const int64_t left = px * pool.window.stride[1] - pool.window.padding[1];
      int64_t patch = top * bands.conv_cols + left;
      bool passes = true;
      if (by_code) {
        patch += offsets[codes[i]];
        passes = codes[i] != kNoWinner<uint8_t> && static_cast<uint64_t>(patch) < patches;
      } else if (rectified) {
        passes = !(outputs[i] <= 0.0f);
      }
      // Written always, kept only if it passes: no branch to mispredict.
      live[count] = {grads[i], static_cast<int32_t>(patch)};
      sum += passes ? grads[i] : 0.0f;
      count += passes;
    }
  }
  *grad_sum += sum;
  return count;
}

// grad [TAPS registers] += sum over the list of gradient * patch, for patches `step` floats apart.
template <int TAPS>
DLFAST_INLINE void stream(const Live* live, int64_t count, const float* patches, int64_t step, float* grad) {
  // Several positions in flight, so that the latency of the multiply-adds of one is hidden by the others.
  constexpr int FLIGHT = TAPS >= 8 ? 1 : TAPS >= 4 ? 2 : 4;
  F acc[FLIGHT][TAPS] = {};
  int64_t i = 0;
  for (; i + FLIGHT <= count; i += FLIGHT) {
    for (int f = 0; f < FLIGHT; ++f) {
      const F g = broadcast<F>(live[i + f].grad);
      const float* patch = patches + live[i + f].at * step;
      for (int t = 0; t < TAPS; ++t) acc[f][t] = g * load<F>(patch + t * kLanes) + acc[f][t];
    }
  }
  for (; i < count; ++i) {
    const F g = broadcast<F>(live[i].grad);
    const float* patch = patches + live[i].at * step;
    for (int t = 0; t < TAPS; ++t) acc[0][t] = g * load<F>(patch + t * kLanes) + acc[0][t];
  }
  for (int t = 0; t < TAPS; ++t) {
    F sum = acc[0][t];
    for (int f = 1; f < FLIGHT; ++f) sum += acc[f][t];
    store(grad + t * kLanes, load<F>(grad + t * kLanes) + sum);
  }
}

template <int TAPS = 1>
void stream_any(int64_t tap_vectors, const Live* live, int64_t count, const float* patches, int64_t step,
                float* grad) {
  if constexpr (TAPS <= kTapVectors) {
    if (tap_vectors == TAPS) return stream<TAPS>(live, count, patches, step, grad);
    return stream_any<TAPS + 1>(tap_vectors, live, count, patches, step, grad);
  }
}

// All taps, as many at a time as registers hold, in passes of even size.
inline void stream_all(int64_t tap_vectors, const Live* live, int64_t count, const float* patches,
                       float* grad) {
  const int64_t passes = (tap_vectors + kTapVectors - 1) / kTapVectors;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = tap_vectors * pass / passes, last = tap_vectors * (pass + 1) / passes;
    stream_any(last - first, live, count, patches + first * kLanes, tap_vectors * kLanes,
               grad + first * kLanes);
  }
}

// Whether every number of one image is finite.
inline bool all_finite(const ConvBlockParams& p, const float* image) {
  const auto [stride_n, stride_c, stride_h, stride_w] = p.input_strides;
  bool finite = true;
  for (int64_t c = 0; c < p.conv.in_channels; ++c) {
    for (int64_t y = 0; y < p.conv.input_size[0]; ++y) {
      const float* row = image + c * stride_c + y * stride_h;
      for (int64_t x = 0; x < p.conv.input_size[1]; ++x) {
        finite &= std::fabs(row[x * stride_w]) <= std::numeric_limits<float>::max();
      }
    }
  }
  return finite;
}

// Every thread count gives its own fixed split into slots, summed in order: the same bits from run to run.
bool grad_weight_patches(const ConvBlockParams& p, const float* input, const float* grad_y, const void* code,
                        float* grad_weight, float* grad_bias, float* scratch) {
  const Bands bands(p);
  const Taps taps(p, bands);
  const PatchScratch sizes(p);
  const int64_t slots = at::get_num_threads(), units = p.conv.batch * bands.per_image;
  const int64_t out_channels = p.conv.out_channels;

  std::atomic<bool> finite{true};
  at::parallel_for(0, slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      float* own_weight = scratch + slot * sizes.per_slot();
      float* own_bias = own_weight + sizes.grad_weight;
      float* packed = own_bias + sizes.grad_bias;
      float* patches = packed + sizes.input;
      Live* live = reinterpret_cast<Live*>(patches + sizes.patches);
      std::fill_n(own_weight, sizes.grad_weight + sizes.grad_bias, 0.0f);
      for (int64_t unit = units * slot / slots; unit < units * (slot + 1) / slots; ++unit) {
        const Band band(p, bands, unit);
        if (band.first_pooled == 0 && !all_finite(p, input + band.image * p.input_strides[0])) finite = false;
        pack_input(p, bands, band, input, packed);
        gather_patches(p, bands, band, taps, sizes.patch, packed, patches);
        for (int64_t k = 0; k < out_channels; ++k) {
          const int64_t count = list_live(p, bands, band, k, grad_y, code, live, own_bias + k);
          stream_all(sizes.tap_vectors, live, count, patches, own_weight + k * sizes.patch);
        }
      }
    }
  });

  // own_weight is [K][kh][kw][C], grad_weight [K][C][kh][kw].
  const int64_t channels = p.conv.in_channels, positions = p.conv.kernel[0] * p.conv.kernel[1];
  for (int64_t k = 0; k < out_channels; ++k) {
    for (int64_t t = 0; t < positions; ++t) {
      for (int64_t c = 0; c < channels; ++c) {
        float sum = 0.0f;
        for (int64_t slot = 0; slot < slots; ++slot) {
          sum += scratch[slot * sizes.per_slot() + k * sizes.patch + t * channels + c];
        }
        grad_weight[(k * channels + c) * positions + t] = sum;
      }
    }
    grad_bias[k] = 0.0f;
    for (int64_t slot = 0; slot < slots; ++slot) {
      grad_bias[k] += scratch[slot * sizes.per_slot() + sizes.grad_weight + k];
    }
  }
  return finite;
}

}  // namespace dlfast::DLFAST_LEVEL
