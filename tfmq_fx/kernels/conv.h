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

// One tile: kTileRows pixels (the last `count` .. are repeats and not stored) by NB * 16 channels.
template <int NB, class Out>
inline __attribute__((noinline)) void conv_tile(const uint8_t* const (&rows)[kTileRows], const int64_t* offsets,
                                                int64_t taps, int64_t depth, const int8_t* weight, const float* scale,
                                                const float* bias, const Out* const (&residual)[kTileRows],
                                                Out* const (&out)[kTileRows], int count) {
  __m512i sums[kTileRows * NB];
  unroll<kTileRows * NB>([&](auto i) __attribute__((always_inline)) { sums[i] = _mm512_setzero_si512(); });
  multiply_tile<kTileRows, NB>(rows, offsets, taps, depth, weight, sums);
  unroll<kTileRows>([&](auto m) __attribute__((always_inline)) {
    if (m < count) {
      unroll<NB>([&](auto n) __attribute__((always_inline)) {
        const __m512 factor = _mm512_loadu_ps(scale + n * kLanes);
        const __m512 offset = _mm512_loadu_ps(bias + n * kLanes);
        __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[m * NB + n]), factor, offset);
        if (residual[m]) value = _mm512_add_ps(value, load_lanes(residual[m] + n * kLanes));
        store_lanes(out[m] + n * kLanes, value);
      });
    }
  });
}

// out[p, k] = scale[k] * sum(x * weight) + bias[k] (+ residual[p, k]); the bias already holds what the zero point of
// the activation adds. The weight is packed [out_channels / (NB * 16)][taps][in_channels / 4][NB * 16][4].
template <int NB, class Out>
void integer_conv(const uint8_t* x, const int8_t* weight, const float* scale, const float* bias, const Out* residual,
                  Out* out, const ConvShape& s) {
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
      const int64_t last = (part + 1) * per_part < tiles ? (part + 1) * per_part : tiles;
      for (int64_t tile = part * per_part; tile < last; ++tile) {
        const uint8_t* rows[kTileRows];
        const Out* added[kTileRows];
        Out* targets[kTileRows];
        const int64_t first = tile * kTileRows;
        const int count = static_cast<int>(pixels - first < kTileRows ? pixels - first : kTileRows);
        for (int m = 0; m < kTileRows; ++m) {
          const int64_t pixel = first + (m < count ? m : count - 1);
          const int64_t image = pixel / area, place = pixel % area;
          const int64_t row = place / s.out_width * s.stride_height, column = place % s.out_width * s.stride_width;
          rows[m] = x + ((image * s.in_height + row) * s.in_width + column) * s.in_channels;
          targets[m] = out + pixel * s.out_channels + block * columns;
          added[m] = residual ? residual + pixel * s.out_channels + block * columns : nullptr;
        }
        conv_tile<NB, Out>(rows, offsets, taps, s.in_channels, packed, scale + block * columns,
                           bias + block * columns, added, targets, count);
      }
    }
  }
}

}  // namespace tfmq
