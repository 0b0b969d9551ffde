// GroupNorm, SiLU and quantization in one pass over an image, channels last; statistics in double by blocks.
#pragma once

#include <cmath>
#include <memory>

#include "vnni.h"

namespace tfmq {

struct NormShape {
  int64_t batch, height, width, groups;
  int64_t channels[2];  // of the concatenated inputs; the second may be 0
  int64_t padding[4];   // of the output: top, left, bottom, right
  int64_t shift_stride;  // from one row of shifts to the next; 0 when all images share one
};

// How many pixels are summed in float32. The first block is short, as its pivot is a pixel, perhaps the one that is far
// off; each is at most four times as long as the one before, so that none outweighs what its pivot is the mean of.
constexpr int64_t kFirstBlock = 8, kLongestBlock = 256;

inline int64_t next_block(int64_t block) { return 4 * block < kLongestBlock ? 4 * block : kLongestBlock; }

TFMQ_INLINE __m512d widen_half(__m512 value, std::integral_constant<int, 0>) {
  return _mm512_cvtps_pd(_mm512_castps512_ps256(value));
}

TFMQ_INLINE __m512d widen_half(__m512 value, std::integral_constant<int, 1>) {
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1));
}

// Mean and sum of squared deviations over the pixels, for V * 16 channels. Each block is summed in float32 around the
// mean of those before it, then joined to them in double (Chan, Golub and LeVeque, 1979): however far one pixel or a
// whole region is off, a block loses to rounding a part of what it adds to the result, and never of more.
template <int V, class In>
TFMQ_INLINE void channel_moments(const In* x, int64_t pixels, int64_t stride, double* means, double* squares) {
  __m512 pivot[V];
  __m512d mean[2 * V], spread[2 * V];
  unroll<V>([&](auto v) __attribute__((always_inline)) { pivot[v] = load_lanes(x + v * kLanes); });
  unroll<2 * V>([&](auto i) __attribute__((always_inline)) { mean[i] = spread[i] = _mm512_setzero_pd(); });
  for (int64_t before = 0, block = kFirstBlock; before < pixels; block = next_block(block)) {
    const int64_t count = block < pixels - before ? block : pixels - before;
    __m512 sum[V], square[V];
    unroll<V>([&](auto v) __attribute__((always_inline)) { sum[v] = square[v] = _mm512_setzero_ps(); });
    for (int64_t p = 0; p < count; ++p, x += stride) {
      unroll<V>([&](auto v) __attribute__((always_inline)) {
        const __m512 d = _mm512_sub_ps(load_lanes(x + v * kLanes), pivot[v]);
        sum[v] = _mm512_add_ps(sum[v], d);
        square[v] = _mm512_fmadd_ps(d, d, square[v]);
      });
    }
    const double share = double(count) / double(before + count);
    const __m512d each = _mm512_set1_pd(1.0 / double(count)), by = _mm512_set1_pd(share);
    const __m512d joined = _mm512_set1_pd(share * double(before));
    unroll<V>([&](auto v) __attribute__((always_inline)) {
      __m256 next[2];
      unroll<2>([&](auto half) __attribute__((always_inline)) {
        const __m512d total = widen_half(sum[v], half), own = _mm512_mul_pd(total, each);
        const __m512d within = _mm512_fnmadd_pd(total, own, widen_half(square[v], half));
        const __m512d apart = _mm512_sub_pd(_mm512_add_pd(widen_half(pivot[v], half), own), mean[2 * v + half]);
        mean[2 * v + half] = _mm512_fmadd_pd(apart, by, mean[2 * v + half]);
        const __m512d across = _mm512_mul_pd(_mm512_mul_pd(apart, apart), joined);
        spread[2 * v + half] = _mm512_add_pd(spread[2 * v + half], _mm512_add_pd(within, across));
        next[half] = _mm512_cvtpd_ps(mean[2 * v + half]);
      });
      pivot[v] = _mm512_insertf32x8(_mm512_castps256_ps512(next[0]), next[1], 1);
    });
    before += count;
  }
  unroll<2 * V>([&](auto i) __attribute__((always_inline)) {
    _mm512_storeu_pd(means + i * (kLanes / 2), mean[i]);
    _mm512_storeu_pd(squares + i * (kLanes / 2), spread[i]);
  });
}

template <class In>
inline void all_channel_moments(const In* x, int64_t pixels, int64_t stride, int64_t channels, double* means,
                                double* squares) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
    channel_moments<4>(x + c, pixels, stride, means + c, squares + c);
  for (; c < channels; c += kLanes) channel_moments<1>(x + c, pixels, stride, means + c, squares + c);
}

// factor[c] and offset[c] such that the normalized value of channel c is x * factor[c] + offset[c].
inline void fold_statistics(int64_t channels, int64_t group, int64_t pixels, float eps, const float* shift,
                            const float* gamma, const float* beta, const double* means, const double* squares,
                            float* factor, float* offset) {
  for (int64_t g = 0; g < channels; g += group) {
    double mean = 0.0, within = 0.0, across = 0.0;
    for (int64_t c = g; c < g + group; ++c) mean += means[c] + (shift ? shift[c] : 0.0f);
    mean /= double(group);
    for (int64_t c = g; c < g + group; ++c) {
      const double apart = means[c] + (shift ? shift[c] : 0.0f) - mean;
      within += squares[c];
      across += apart * apart;
    }
    const double rstd = 1.0 / std::sqrt((within / double(pixels) + across) / double(group) + eps);
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

inline void fill_border(uint8_t* target, int64_t count, int zero_point) { std::memset(target, zero_point, count); }

template <class Out>
inline void fill_border(Out* target, int64_t count, int) {
  std::memset(target, 0, count * sizeof(Out));
}

// out = quantize(silu(group_norm(concatenate(x) + shift)) * by), with a border of zero points; a float Out is not
// quantized. `by` has a number for each channel, or is null.
template <bool kSilu, class In, class Out>
void group_norm(const In* first, const In* second, const float* shift, const float* gamma, const float* beta,
                const float* by, Out* out, const NormShape& s, float eps, const Quantizers& quantizers) {
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
#pragma omp parallel
  {
    // On the heap: a thread's stack need not hold as many channels as a model may have.
    const std::unique_ptr<double[]> means(new double[width]), squares(new double[width]);
    const std::unique_ptr<float[]> factors(new float[width]), offsets(new float[width]);
    float* const factor = factors.get();
    float* const offset = offsets.get();
#pragma omp for collapse(2) schedule(static)
    for (int64_t image = 0; image < s.batch; ++image) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * width, end = begin + width;
        const Affine quantizer = quantizers(image);
        const int zero_point = quantizer.zero_point;
        const __m512 inverse_scale = _mm512_set1_ps(inverse_of(quantizer.scale));
        const __m512i zero = _mm512_set1_epi32(zero_point);
        // The part of each input that lies in [begin, end), in channels of the concatenation.
        const int64_t cut = s.channels[0] < begin ? begin : (s.channels[0] > end ? end : s.channels[0]);
        const In* left = first + image * pixels * s.channels[0];
        const In* right = second ? second + image * pixels * s.channels[1] - s.channels[0] : nullptr;
        if (cut > begin)
          all_channel_moments(left + begin, pixels, s.channels[0], cut - begin, means.get(), squares.get());
        if (end > cut)
          all_channel_moments(right + cut, pixels, s.channels[1], end - cut, means.get() + cut - begin,
                              squares.get() + cut - begin);
        fold_statistics(width, group, pixels, eps, shift ? shift + image * s.shift_stride + begin : nullptr,
                        gamma + begin, beta + begin, means.get(), squares.get(), factor, offset);
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
              if (by) y = _mm512_mul_ps(y, _mm512_loadu_ps(by + c));
              store_normalized(target + c, y, inverse_scale, zero);
            }
            const In* b = right + pixel * s.channels[1];
            for (int64_t c = cut; c < end; c += kLanes) {
              __m512 y = _mm512_fmadd_ps(load_lanes(b + c), _mm512_loadu_ps(factor + c - begin),
                                         _mm512_loadu_ps(offset + c - begin));
              if (kSilu) y = silu_lanes(y);
              if (by) y = _mm512_mul_ps(y, _mm512_loadu_ps(by + c));
              store_normalized(target + c, y, inverse_scale, zero);
            }
          }
        }
      }
    }
  }
}

}  // namespace tfmq
