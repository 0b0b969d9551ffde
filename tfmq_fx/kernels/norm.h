// GroupNorm, SiLU and quantization in one pass over an image, channels last; statistics in float32.
#pragma once

#include <cmath>

#include "vnni.h"

namespace tfmq {

struct NormShape {
  int64_t batch, height, width, groups;
  int64_t channels[2];  // of the concatenated inputs; the second may be 0
  int64_t padding[4];   // of the output: top, left, bottom, right
  int64_t shift_stride;  // from one row of shifts to the next; 0 when all images share one
};

// Sums of (x - pivot) and its square over the pixels, for V * 16 channels; the pivot is the first pixel.
template <int V, class In>
TFMQ_INLINE void channel_sums(const In* x, int64_t pixels, int64_t stride, float* pivots, float* sums, float* squares) {
  __m512 pivot[V], sum[V], square[V];
  unroll<V>([&](auto v) __attribute__((always_inline)) {
    pivot[v] = load_lanes(x + v * kLanes);
    sum[v] = square[v] = _mm512_setzero_ps();
  });
  for (int64_t p = 0; p < pixels; ++p, x += stride) {
    unroll<V>([&](auto v) __attribute__((always_inline)) {
      const __m512 d = _mm512_sub_ps(load_lanes(x + v * kLanes), pivot[v]);
      sum[v] = _mm512_add_ps(sum[v], d);
      square[v] = _mm512_fmadd_ps(d, d, square[v]);
    });
  }
  unroll<V>([&](auto v) __attribute__((always_inline)) {
    _mm512_storeu_ps(pivots + v * kLanes, pivot[v]);
    _mm512_storeu_ps(sums + v * kLanes, sum[v]);
    _mm512_storeu_ps(squares + v * kLanes, square[v]);
  });
}

template <class In>
inline void all_channel_sums(const In* x, int64_t pixels, int64_t stride, int64_t channels, float* pivots, float* sums,
                             float* squares) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
    channel_sums<4>(x + c, pixels, stride, pivots + c, sums + c, squares + c);
  for (; c < channels; c += kLanes) channel_sums<1>(x + c, pixels, stride, pivots + c, sums + c, squares + c);
}

constexpr int64_t kMaxChannels = 8192;

// factor[c] and offset[c] such that the normalized value of channel c is x * factor[c] + offset[c].
inline void fold_statistics(int64_t channels, int64_t group, int64_t pixels, float eps, const float* shift,
                            const float* gamma, const float* beta, const float* pivots, const float* sums,
                            const float* squares, float* factor, float* offset) {
  for (int64_t g = 0; g < channels; g += group) {
    double mean = 0.0;
    for (int64_t c = g; c < g + group; ++c) mean += pivots[c] + sums[c] / double(pixels) + (shift ? shift[c] : 0.0f);
    mean /= double(group);
    double variance = 0.0;
    for (int64_t c = g; c < g + group; ++c) {
      const double own = sums[c] / double(pixels);
      const double apart = pivots[c] + own + (shift ? shift[c] : 0.0f) - mean;
      variance += squares[c] / double(pixels) - own * own + apart * apart;
    }
    const double rstd = 1.0 / std::sqrt(variance / double(group) + eps);
    for (int64_t c = g; c < g + group; ++c) {
      factor[c] = float(rstd * gamma[c]);
      offset[c] = float(((shift ? shift[c] : 0.0f) - mean) * rstd * gamma[c] + beta[c]);
    }
  }
}

TFMQ_INLINE void store_normalized(uint8_t* target, __m512 y, __m512 inverse_scale, __m512i zero_point) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), quantize_lanes(y, inverse_scale, zero_point));
}

template <class Out>
TFMQ_INLINE void store_normalized(Out* target, __m512 y, __m512, __m512i) {
  store_lanes(target, y);
}

inline void fill_border(uint8_t* target, int64_t count, int64_t zero_point) { std::memset(target, int(zero_point), count); }

template <class Out>
inline void fill_border(Out* target, int64_t count, int64_t) {
  std::memset(target, 0, count * sizeof(Out));
}

// out = quantize(silu(group_norm(concatenate(x) + shift))), with a border of zero points; a float Out is not quantized.
template <bool kSilu, class In, class Out>
void group_norm(const In* first, const In* second, const float* shift, const float* gamma, const float* beta, Out* out,
                const NormShape& s, float eps, float scale, int64_t zero_point) {
  const int64_t channels = s.channels[0] + s.channels[1], group = channels / s.groups, pixels = s.height * s.width;
  const int64_t out_height = s.height + s.padding[0] + s.padding[2];
  const int64_t out_width = s.width + s.padding[1] + s.padding[3];
  // A part holds whole groups and whole vectors, of one input.
  int64_t step = group;
  while (step % kLanes != 0) step += group;
  int64_t parts = 1;
  const int64_t threads = omp_get_max_threads();
  while ((s.batch * parts) % threads != 0 && parts < threads && channels % ((parts + 1) * step) == 0) ++parts;
  const int64_t width = channels / parts;
  const __m512 inverse_scale = _mm512_set1_ps(1.0f / scale);
  const __m512i zero = _mm512_set1_epi32(int32_t(zero_point));
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t part = 0; part < parts; ++part) {
      alignas(64) float pivots[kMaxChannels], sums[kMaxChannels], squares[kMaxChannels];
      const int64_t begin = part * width, end = begin + width;
      // The part of each input that lies in [begin, end), in channels of the concatenation.
      const int64_t cut = s.channels[0] < begin ? begin : (s.channels[0] > end ? end : s.channels[0]);
      const In* left = first + image * pixels * s.channels[0];
      const In* right = second ? second + image * pixels * s.channels[1] - s.channels[0] : nullptr;
      if (cut > begin)
        all_channel_sums(left + begin, pixels, s.channels[0], cut - begin, pivots, sums, squares);
      if (end > cut)
        all_channel_sums(right + cut, pixels, s.channels[1], end - cut, pivots + cut - begin, sums + cut - begin,
                         squares + cut - begin);
      float factor[kMaxChannels], offset[kMaxChannels];
      fold_statistics(width, group, pixels, eps, shift ? shift + image * s.shift_stride + begin : nullptr,
                      gamma + begin, beta + begin, pivots, sums, squares, factor, offset);
      for (int64_t row = 0; row < out_height; ++row) {
        Out* target = out + (image * out_height + row) * out_width * channels;
        const bool inside = row >= s.padding[0] && row < s.padding[0] + s.height;
        for (int64_t column = 0; column < out_width; ++column, target += channels) {
          if (!inside || column < s.padding[1] || column >= s.padding[1] + s.width) {
            fill_border(target + begin, width, zero_point);
            continue;
          }
          const int64_t pixel = (row - s.padding[0]) * s.width + column - s.padding[1];
          const In* a = left + pixel * s.channels[0];
          for (int64_t c = begin; c < cut; c += kLanes) {
            __m512 y = _mm512_fmadd_ps(load_lanes(a + c), _mm512_loadu_ps(factor + c - begin),
                                       _mm512_loadu_ps(offset + c - begin));
            if (kSilu) y = silu_lanes(y);
            store_normalized(target + c, y, inverse_scale, zero);
          }
          const In* b = right + pixel * s.channels[1];
          for (int64_t c = cut; c < end; c += kLanes) {
            __m512 y = _mm512_fmadd_ps(load_lanes(b + c), _mm512_loadu_ps(factor + c - begin),
                                       _mm512_loadu_ps(offset + c - begin));
            if (kSilu) y = silu_lanes(y);
            store_normalized(target + c, y, inverse_scale, zero);
          }
        }
      }
    }
  }
}

}  // namespace tfmq
