// Integer convolution, channels last: unsigned activations, padded beforehand, by signed packed weights.
#pragma once

#include "vnni.h"

namespace tfmq {

struct ConvShape {
  int64_t batch, in_height, in_width, in_channels;  // of the padded input
  int64_t out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, stride_height, stride_width;
};

// How many parts to cut the pixels into, so that parts * blocks tasks share out evenly among the threads.
inline int64_t pixel_parts(int64_t blocks, int64_t tiles, int64_t threads) {
  int64_t parts = 1;
  while ((blocks * parts) % threads != 0 && parts < threads && parts < tiles) ++parts;
  return parts;
}

constexpr int kTileRows = 6;
constexpr int64_t kMaxTaps = 64;

// What becomes of the sums where one quantizer is for all images; the bias already holds what its zero point adds.
struct SharedScales {
  const float* scale;
  const float* bias;

  SharedScales block(int64_t column) const { return {scale + column, bias + column}; }
  void tile(const int64_t (&)[kTileRows]) {}
  TFMQ_INLINE __m512 value(int, int n, __m512i sum) const {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scale + n * kLanes),
                           _mm512_loadu_ps(bias + n * kLanes));
  }
};

// The same where each image has its own: what the zero point adds is taken off in integers, so it is exact.
struct ScalesByImage {
  const float* scale;        // of the weight
  const int32_t* weight_sum;
  const float* bias;
  Quantizers quantizers;
  Affine affine[kTileRows] = {};

  ScalesByImage block(int64_t column) const { return {scale + column, weight_sum + column, bias + column, quantizers}; }
  void tile(const int64_t (&images)[kTileRows]) {
    // Pixels lie in order: where the first and the last are of one item, all are.
    const bool alike = quantizers.item(images[0]) == quantizers.item(images[kTileRows - 1]);
    for (int m = 0; m < kTileRows; ++m) affine[m] = m > 0 && alike ? affine[0] : quantizers(images[m]);
  }
  TFMQ_INLINE __m512 value(int m, int n, __m512i sum) const {
    const __m512i of_zeros = _mm512_mullo_epi32(_mm512_loadu_si512(weight_sum + n * kLanes),
                                                _mm512_set1_epi32(affine[m].zero_point));
    const __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(scale + n * kLanes), _mm512_set1_ps(affine[m].scale));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, of_zeros)), factor,
                           _mm512_loadu_ps(bias + n * kLanes));
  }
};

// One tile: kTileRows pixels (the last `count` .. are repeats and not stored) by NB * 16 channels.
template <int NB, class Out, class Scales>
inline __attribute__((noinline)) void conv_tile(const uint8_t* const (&rows)[kTileRows], const int64_t* offsets,
                                                int64_t taps, int64_t depth, const int8_t* weight, const Scales& scales,
                                                const Out* const (&residual)[kTileRows], Out* const (&out)[kTileRows],
                                                int count) {
  __m512i sums[kTileRows * NB];
  unroll<kTileRows * NB>([&](auto i) __attribute__((always_inline)) { sums[i] = _mm512_setzero_si512(); });
  multiply_tile<kTileRows, NB>(rows, offsets, taps, depth, weight, sums);
  unroll<kTileRows>([&](auto m) __attribute__((always_inline)) {
    if (m < count) {
      unroll<NB>([&](auto n) __attribute__((always_inline)) {
        __m512 value = scales.value(m, n, sums[m * NB + n]);
        if (residual[m]) value = _mm512_add_ps(value, load_lanes(residual[m] + n * kLanes));
        store_lanes(out[m] + n * kLanes, value);
      });
    }
  });
}

// out[p, k] = what `scales` make of sum(x * weight)[p, k] (+ residual[p, k]).
// The weight is packed [out_channels / (NB * 16)][taps][in_channels / 4][NB * 16][4].
template <int NB, class Out, class Scales>
void integer_conv(const uint8_t* x, const int8_t* weight, const Scales& scales, const Out* residual, Out* out,
                  const ConvShape& s) {
  const int64_t taps = s.kernel_height * s.kernel_width;
  int64_t offsets[kMaxTaps];
  for (int64_t i = 0; i < s.kernel_height; ++i)
    for (int64_t j = 0; j < s.kernel_width; ++j)
      offsets[i * s.kernel_width + j] = (i * s.in_width + j) * s.in_channels;
  const int64_t area = s.out_height * s.out_width, pixels = s.batch * area;
  const int64_t columns = NB * kLanes, blocks = s.out_channels / columns;
  const int64_t tiles = (pixels + kTileRows - 1) / kTileRows;
  const int64_t parts = pixel_parts(blocks, tiles, omp_get_max_threads());
  const int64_t per_part = (tiles + parts - 1) / parts;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t part = 0; part < parts; ++part) {
      const int8_t* packed = weight + block * taps * s.in_channels * columns;
      Scales of_block = scales.block(block * columns);
      const int64_t last = (part + 1) * per_part < tiles ? (part + 1) * per_part : tiles;
      for (int64_t tile = part * per_part; tile < last; ++tile) {
        const uint8_t* rows[kTileRows];
        const Out* added[kTileRows];
        Out* targets[kTileRows];
        int64_t images[kTileRows];
        const int64_t first = tile * kTileRows;
        const int count = static_cast<int>(pixels - first < kTileRows ? pixels - first : kTileRows);
        for (int m = 0; m < kTileRows; ++m) {
          const int64_t pixel = first + (m < count ? m : count - 1);
          const int64_t image = images[m] = pixel / area, place = pixel % area;
          const int64_t row = place / s.out_width * s.stride_height, column = place % s.out_width * s.stride_width;
          rows[m] = x + ((image * s.in_height + row) * s.in_width + column) * s.in_channels;
          targets[m] = out + pixel * s.out_channels + block * columns;
          added[m] = residual ? residual + pixel * s.out_channels + block * columns : nullptr;
        }
        of_block.tile(images);
        conv_tile<NB, Out>(rows, offsets, taps, s.in_channels, packed, of_block, added, targets, count);
      }
    }
  }
}

}  // namespace tfmq
