// A 1x1 convolution, channels last, of an image that it quantizes itself: to 16 bits, as two bytes of each value.
#pragma once

#include <memory>

#include "vnni.h"

namespace tfmq {

struct PointwiseShape {
  int64_t batch, pixels, in_channels, out_channels;  // pixels of one image
};

// Pixels of a tile: their high and low bytes are as many rows again, which share each load of the weight.
constexpr int kTilePixels = 3;
// Bytes that are quantized before they are multiplied: all blocks of columns read them from the nearest cache.
constexpr int64_t kQuantizedBytes = 1 << 16;

// As many tiles as the nearest cache has room for, but so that the chunks of all images share out among the threads.
inline int64_t tiles_of_chunk(int64_t batch, int64_t tiles, int64_t depth, int64_t threads) {
  const int64_t most = std::min<int64_t>(16, std::max<int64_t>(1, kQuantizedBytes / (2 * kTilePixels * depth)));
  int64_t chunks = (tiles + most - 1) / most;
  if (batch % threads != 0) chunks = (chunks + threads - 1) / threads * threads;
  return std::max<int64_t>(1, (tiles + chunks - 1) / chunks);
}

// round(value * inverse_scale) + zero_point, in 0..65535, its high and low bytes; NaN becomes 0.
TFMQ_INLINE void quantize_words(__m512 value, __m512 inverse_scale, __m512i zero_point, uint8_t* high, uint8_t* low) {
  const __m512 steps = at_most(_mm512_set1_ps(65535.0f), _mm512_mul_ps(value, inverse_scale));
  const __m512i shifted = _mm512_add_epi32(_mm512_cvtps_epi32(steps), zero_point);
  const __m512i bounded =
      _mm512_min_epi32(_mm512_max_epi32(shifted, _mm512_setzero_si512()), _mm512_set1_epi32(65535));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bounded, 8)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(bounded));
}

// What one item's quantizer makes of the constants of all output channels.
struct PointwiseItem {
  std::unique_ptr<float[]> scale;
  std::unique_ptr<int32_t[]> high, low;  // what the bytes of the zero point add to each sum, taken off

  explicit PointwiseItem(int64_t channels)
      : scale(new float[channels]), high(new int32_t[channels]), low(new int32_t[channels]) {}

  void enter(const Affine& affine, const float* weight_scale, const int32_t* weight_sum, int64_t channels) {
    const __m512i high_byte = _mm512_set1_epi32(-(affine.zero_point >> 8));
    const __m512i low_byte = _mm512_set1_epi32(-(affine.zero_point & 255));
    for (int64_t c = 0; c < channels; c += kLanes) {
      const __m512i sum = _mm512_loadu_si512(weight_sum + c);
      _mm512_storeu_si512(high.get() + c, _mm512_mullo_epi32(sum, high_byte));
      _mm512_storeu_si512(low.get() + c, _mm512_mullo_epi32(sum, low_byte));
      _mm512_storeu_ps(scale.get() + c, _mm512_mul_ps(_mm512_loadu_ps(weight_scale + c), _mm512_set1_ps(affine.scale)));
    }
  }
};

// One tile: kTilePixels pixels (the last `count` .. are repeats and not stored) by NB * 16 channels.
template <int NB, class Out>
inline __attribute__((noinline)) void pointwise_tile(const uint8_t* const (&rows)[2 * kTilePixels], int64_t depth,
                                                     const int8_t* weight, const float* scale, const int32_t* high,
                                                     const int32_t* low, const float* bias, const Out* residual,
                                                     Out* out, int64_t pitch, int count) {
  __m512i sums[2 * kTilePixels * NB];
  unroll<kTilePixels>([&](auto m) __attribute__((always_inline)) {
    unroll<NB>([&](auto n) __attribute__((always_inline)) {
      sums[m * NB + n] = _mm512_loadu_si512(high + n * kLanes);
      sums[(kTilePixels + m) * NB + n] = _mm512_loadu_si512(low + n * kLanes);
    });
  });
  const int64_t offsets[1] = {0};
  multiply_tile<2 * kTilePixels, NB>(rows, offsets, 1, depth, weight, sums);
  unroll<kTilePixels>([&](auto m) __attribute__((always_inline)) {
    if (m < count) {
      unroll<NB>([&](auto n) __attribute__((always_inline)) {
        const __m512 of_high = _mm512_cvtepi32_ps(sums[m * NB + n]);
        const __m512 of_low = _mm512_cvtepi32_ps(sums[(kTilePixels + m) * NB + n]);
        const __m512 sum = _mm512_fmadd_ps(of_high, _mm512_set1_ps(256.0f), of_low);
        __m512 value =
            _mm512_fmadd_ps(sum, _mm512_loadu_ps(scale + n * kLanes), _mm512_loadu_ps(bias + n * kLanes));
        if (residual) value = _mm512_add_ps(value, load_lanes(residual + m * pitch + n * kLanes));
        store_lanes(out + m * pitch + n * kLanes, value);
      });
    }
  });
}

// out[p, k] = s * weight_scale[k] * sum((quantize(x * by) - z) * weight)[p, k] + bias[k] (+ residual[p, k]); `by` and
// `residual` may be null. The weight is packed as that of `integer_conv`, of one tap.
template <int NB, class In, class Out>
void pointwise_conv(const In* x, const float* by, const int8_t* weight, const float* weight_scale,
                    const int32_t* weight_sum, const float* bias, const Out* residual, Out* out,
                    const PointwiseShape& s, const Quantizers& quantizers) {
  const int64_t depth = s.in_channels, channels = s.out_channels, columns = NB * kLanes;
  // Chunks of neighbouring tiles: never of two images, so that a chunk has one quantizer.
  const int64_t tiles = (s.pixels + kTilePixels - 1) / kTilePixels;
  const int64_t chunk_tiles = tiles_of_chunk(s.batch, tiles, depth, omp_get_max_threads());
  const int64_t chunk_pixels = kTilePixels * chunk_tiles, chunks = (tiles + chunk_tiles - 1) / chunk_tiles;
#pragma omp parallel
  {
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[2 * chunk_pixels * depth]);
    PointwiseItem item(channels);
    int64_t entered = -1;
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < s.batch * chunks; ++chunk) {
      const int64_t image = chunk / chunks, first = chunk % chunks * chunk_pixels;
      const int64_t count = std::min(chunk_pixels, s.pixels - first), place = image * s.pixels + first;
      const Affine affine = quantizers(image);
      if (const int64_t row = quantizers.row(image); row != entered) {
        item.enter(affine, weight_scale, weight_sum, channels);
        entered = row;
      }
      uint8_t* const high = bytes.get();
      uint8_t* const low = high + chunk_pixels * depth;
      const __m512 inverse_scale = _mm512_set1_ps(inverse_of(affine.scale));
      const __m512i zero_point = _mm512_set1_epi32(affine.zero_point);
      for (int64_t pixel = 0; pixel < count; ++pixel) {
        const In* source = x + (place + pixel) * depth;
        for (int64_t c = 0; c < depth; c += kLanes) {
          const __m512 value = load_lanes(source + c);
          const __m512 scaled = by ? _mm512_mul_ps(value, _mm512_loadu_ps(by + c)) : value;
          quantize_words(scaled, inverse_scale, zero_point, high + pixel * depth + c, low + pixel * depth + c);
        }
      }
      for (int64_t column = 0; column < channels; column += columns) {
        for (int64_t pixel = 0; pixel < count; pixel += kTilePixels) {
          const int stored = static_cast<int>(std::min<int64_t>(kTilePixels, count - pixel));
          const uint8_t* rows[2 * kTilePixels];
          for (int m = 0; m < kTilePixels; ++m) {
            const int64_t at = (pixel + std::min(m, stored - 1)) * depth;
            rows[m] = high + at;
            rows[kTilePixels + m] = low + at;
          }
          const int64_t target = (place + pixel) * channels + column;
          pointwise_tile<NB, Out>(rows, depth, weight + column * depth, item.scale.get() + column,
                                  item.high.get() + column, item.low.get() + column, bias + column,
                                  residual ? residual + target : nullptr, out + target, channels, stored);
        }
      }
    }
  }
}

}  // namespace tfmq
