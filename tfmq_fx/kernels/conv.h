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
constexpr int64_t kMaxColumns = 4 * kLanes;

// What becomes of the sums where one quantizer is for all images; the bias already holds what its zero point adds.
struct SharedScales {
  const float* scale;
  const float* bias;

  SharedScales block(int64_t column) const { return {scale + column, bias + column}; }
  template <int NB, class Run>
  TFMQ_INLINE void tile(const int64_t (&)[kTileRows], Run&& run) {
    run(*this);
  }
  TFMQ_INLINE __m512i start(int, int) const { return _mm512_setzero_si512(); }
  TFMQ_INLINE __m512 value(int, int n, __m512i sum) const {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scale + n * kLanes),
                           _mm512_loadu_ps(bias + n * kLanes));
  }
};

// What a zero point adds to each sum is taken off before the first product, in integers, so it is exact.
TFMQ_INLINE __m512i taken_off(const int32_t* weight_sum, int zero_point) {
  return _mm512_mullo_epi32(_mm512_loadu_si512(weight_sum), _mm512_set1_epi32(-zero_point));
}

// The same where all pixels of a tile are of one item: its numbers, worked out.
struct ItemScales {
  float scale[kMaxColumns];
  int32_t starts[kMaxColumns];
  const float* bias;

  TFMQ_INLINE __m512i start(int, int n) const { return _mm512_loadu_si512(starts + n * kLanes); }
  TFMQ_INLINE __m512 value(int, int n, __m512i sum) const {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scale + n * kLanes),
                           _mm512_loadu_ps(bias + n * kLanes));
  }
};

// The same where each pixel of a tile may be of another item.
struct PixelScales {
  const float* scale;
  const int32_t* weight_sum;
  const float* bias;
  Affine affine[kTileRows];

  TFMQ_INLINE __m512i start(int m, int n) const { return taken_off(weight_sum + n * kLanes, affine[m].zero_point); }
  TFMQ_INLINE __m512 value(int m, int n, __m512i sum) const {
    const __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(scale + n * kLanes), _mm512_set1_ps(affine[m].scale));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, _mm512_loadu_ps(bias + n * kLanes));
  }
};

// Where each image has its own quantizer: both of them, as each tile needs it.
struct ScalesByImage {
  const float* scale;  // of the weight
  const int32_t* weight_sum;
  const float* bias;
  Quantizers quantizers;
  int64_t begin = 0, end = 0;  // the images that `item` is of
  ItemScales item = {};

  ScalesByImage block(int64_t column) const { return {scale + column, weight_sum + column, bias + column, quantizers}; }

  template <int NB, class Run>
  TFMQ_INLINE void tile(const int64_t (&images)[kTileRows], Run&& run) {
    if (images[0] < begin || images[0] >= end) enter<NB>(images[0]);
    if (images[kTileRows - 1] < end) return run(item);  // pixels lie in order
    PixelScales each{scale, weight_sum, bias, {}};
    for (int m = 0; m < kTileRows; ++m) each.affine[m] = quantizers(images[m]);
    run(each);
  }

  template <int NB>
  void enter(int64_t image) {
    begin = quantizers.item(image) * quantizers.images_per_item;
    end = begin + quantizers.images_per_item;
    const Affine affine = quantizers(image);
    item.bias = bias;
    for (int64_t c = 0; c < NB * kLanes; c += kLanes) {
      _mm512_storeu_ps(item.scale + c, _mm512_mul_ps(_mm512_loadu_ps(scale + c), _mm512_set1_ps(affine.scale)));
      _mm512_storeu_si512(item.starts + c, taken_off(weight_sum + c, affine.zero_point));
    }
  }
};

// Where a pixel of the output is. It is counted on: to divide takes as long as dozens of products.
struct Pixel {
  int64_t index, image, row, column;

  Pixel(int64_t index, const ConvShape& s)
      : index(index),
        image(index / (s.out_height * s.out_width)),
        row(index / s.out_width % s.out_height),
        column(index % s.out_width) {}

  TFMQ_INLINE void advance(const ConvShape& s) {
    ++index;
    if (++column < s.out_width) return;
    column = 0;
    if (++row < s.out_height) return;
    row = 0;
    ++image;
  }
};

// One tile: kTileRows pixels (the last `count` .. are repeats and not stored) by NB * 16 channels.
template <int NB, class Out, class Scales>
inline __attribute__((noinline)) void conv_tile(const uint8_t* const (&rows)[kTileRows], const int64_t* offsets,
                                                int64_t taps, int64_t depth, const int8_t* weight, const Scales& scales,
                                                const Out* const (&residual)[kTileRows], Out* const (&out)[kTileRows],
                                                int count) {
  __m512i sums[kTileRows * NB];
  unroll<kTileRows>([&](auto m) __attribute__((always_inline)) {
    unroll<NB>([&](auto n) __attribute__((always_inline)) { sums[m * NB + n] = scales.start(m, n); });
  });
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
  static_assert(NB * kLanes <= kMaxColumns, "ItemScales holds that many columns");
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  if (pixels == 0) return;
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
      Pixel pixel(part * per_part * kTileRows, s);
      for (int64_t tile = part * per_part; tile < last; ++tile, pixel.advance(s)) {
        const uint8_t* rows[kTileRows];
        const Out* added[kTileRows];
        Out* targets[kTileRows];
        int64_t images[kTileRows];
        const int count = static_cast<int>(std::min<int64_t>(pixels - pixel.index, kTileRows));
        for (int m = 0; m < kTileRows; ++m) {
          if (m > 0 && m < count) pixel.advance(s);
          const int64_t line = pixel.image * s.in_height + pixel.row * s.stride_height;
          const int64_t place = pixel.index * s.out_channels + block * columns;
          rows[m] = x + (line * s.in_width + pixel.column * s.stride_width) * s.in_channels;
          targets[m] = out + place;
          added[m] = residual ? residual + place : nullptr;
          images[m] = pixel.image;
        }
        of_block.template tile<NB>(images, [&](const auto& of_tile) {
          conv_tile<NB, Out>(rows, offsets, taps, s.in_channels, packed, of_tile, added, targets, count);
        });
      }
    }
  }
}

}  // namespace tfmq
