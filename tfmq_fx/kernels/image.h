// Quantize an image, channels last, enlarging it by whole pixels and adding a border of zero points on the way.
#pragma once

#include "vnni.h"

namespace tfmq {

struct ImageShape {
  int64_t batch, height, width, channels;
  int64_t enlarge;     // nearest-neighbour factor of both axes
  int64_t padding[4];  // top, left, bottom, right, in pixels of the output
};

// out = quantize(x * by), by a number for each channel; `by` may be null.
template <class In>
void quantize_image(const In* x, const float* by, uint8_t* out, const ImageShape& s, const Quantizers& quantizers) {
  const int64_t out_height = s.height * s.enlarge + s.padding[0] + s.padding[2];
  const int64_t out_width = s.width * s.enlarge + s.padding[1] + s.padding[3];
  // Not read off `s` in the loops: a byte stored could be one of its own.
  const int64_t width = s.width, channels = s.channels, enlarge = s.enlarge, pitch = out_width * channels;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < s.batch * s.height; ++line) {
    const int64_t image = line / s.height, row = line % s.height;
    const Affine quantizer = quantizers(image);
    const int zero_point = quantizer.zero_point;
    const __m512 inverse_scale = _mm512_set1_ps(inverse_of(quantizer.scale));
    const __m512i zero = _mm512_set1_epi32(zero_point);
    const In* source = x + line * width * channels;
    uint8_t* start = out + (image * out_height + s.padding[0] + row * enlarge) * pitch;
    std::memset(start, zero_point, s.padding[1] * channels);
    uint8_t* target = start + s.padding[1] * channels;
    if (enlarge == 1 && !by) {
      for (int64_t c = 0; c < width * channels; c += kLanes)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + c),
                         quantize_lanes(load_lanes(source + c), inverse_scale, zero));
    } else {
      for (int64_t column = 0; column < width; ++column, source += channels, target += enlarge * channels) {
        for (int64_t c = 0; c < channels; c += kLanes) {
          const __m512 value = load_lanes(source + c);
          const __m512 scaled = by ? _mm512_mul_ps(value, _mm512_loadu_ps(by + c)) : value;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(target + c), quantize_lanes(scaled, inverse_scale, zero));
        }
        for (int64_t copy = 1; copy < enlarge; ++copy) std::memcpy(target + copy * channels, target, channels);
      }
    }
    std::memset(start + pitch - s.padding[3] * channels, zero_point, s.padding[3] * channels);
    for (int64_t copy = 1; copy < enlarge; ++copy) std::memcpy(start + copy * pitch, start, pitch);
    if (row == 0) std::memset(start - s.padding[0] * pitch, zero_point, s.padding[0] * pitch);
    if (row == s.height - 1) std::memset(start + enlarge * pitch, zero_point, s.padding[2] * pitch);
  }
}

}  // namespace tfmq
