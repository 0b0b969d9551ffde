// Quantize an image, channels last, enlarging it by whole pixels and adding a border of zero points on the way.
#pragma once

#include "vnni.h"

namespace tfmq {

struct ImageShape {
  int64_t batch, height, width, channels;
  int64_t enlarge;     // nearest-neighbour factor of both axes
  int64_t padding[4];  // top, left, bottom, right, in pixels of the output
};

template <class In>
void quantize_image(const In* x, uint8_t* out, const ImageShape& s, float scale, int64_t zero_point) {
  const __m512 inverse_scale = _mm512_set1_ps(1.0f / scale);
  const __m512i zero = _mm512_set1_epi32(int32_t(zero_point));
  const int64_t out_height = s.height * s.enlarge + s.padding[0] + s.padding[2];
  const int64_t out_width = s.width * s.enlarge + s.padding[1] + s.padding[3];
  const int64_t pitch = out_width * s.channels;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < s.batch * s.height; ++line) {
    const int64_t image = line / s.height, row = line % s.height;
    const In* source = x + line * s.width * s.channels;
    uint8_t* start = out + (image * out_height + s.padding[0] + row * s.enlarge) * pitch;
    std::memset(start, int(zero_point), s.padding[1] * s.channels);
    for (int64_t column = 0; column < s.width; ++column) {
      uint8_t* target = start + (s.padding[1] + column * s.enlarge) * s.channels;
      for (int64_t c = 0; c < s.channels; c += kLanes) {
        const __m128i bytes = quantize_lanes(load_lanes(source + column * s.channels + c), inverse_scale, zero);
        for (int64_t copy = 0; copy < s.enlarge; ++copy)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(target + copy * s.channels + c), bytes);
      }
    }
    std::memset(start + pitch - s.padding[3] * s.channels, int(zero_point), s.padding[3] * s.channels);
    for (int64_t copy = 1; copy < s.enlarge; ++copy) std::memcpy(start + copy * pitch, start, pitch);
    if (row == 0) std::memset(start - s.padding[0] * pitch, int(zero_point), s.padding[0] * pitch);
    if (row == s.height - 1) std::memset(start + s.enlarge * pitch, int(zero_point), s.padding[2] * pitch);
  }
}

}  // namespace tfmq
