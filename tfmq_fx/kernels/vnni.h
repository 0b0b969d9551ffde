// Building blocks of the integer kernels: AVX-512 with VNNI. A product is an unsigned byte (the activation) times a
// signed byte (the weight); four neighbours in the depth are summed into one 32-bit lane.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)
#error "the integer kernels need AVX-512 with VNNI"
#endif

#define TFMQ_INLINE inline __attribute__((always_inline))

namespace tfmq {

constexpr int64_t kLanes = 16;

// The 16 bits of a bfloat16.
struct bf16 {
  uint16_t bits;
};

template <class F, int... I>
TFMQ_INLINE void unroll_over(F&& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// Calls body(0), ..., body(N - 1) with constants, so that arrays they index become registers.
template <int N, class F>
TFMQ_INLINE void unroll(F&& body) {
  unroll_over(body, std::make_integer_sequence<int, N>{});
}

TFMQ_INLINE __m512 load_lanes(const float* source) { return _mm512_loadu_ps(source); }

TFMQ_INLINE __m512 load_lanes(const bf16* source) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

TFMQ_INLINE void store_lanes(float* target, __m512 value) { _mm512_storeu_ps(target, value); }

// Rounds to the nearest bfloat16, ties to even. NaN stays NaN: one that arithmetic made, or that was a bfloat16 before,
// has no low bits that could carry.
TFMQ_INLINE void store_lanes(bf16* target, __m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// What a value is multiplied by to count it in steps of `scale`: rounded once, from double, as torch does it.
inline float inverse_of(float scale) { return static_cast<float>(1.0 / static_cast<double>(scale)); }

// The smaller of both; `value` where that is NaN. As an intrinsic, some floating-point options let operands be swapped.
TFMQ_INLINE __m512 at_most(__m512 limit, __m512 value) {
  asm("vminps %2, %1, %0" : "=v"(value) : "v"(limit), "v"(value));
  return value;
}

// round(value * inverse_scale) + zero_point, in 0..255; the infinities are as far as any number gets. A byte has no
// NaN: it becomes 0, so who must not miss one looks for it before it gets here.
TFMQ_INLINE __m128i quantize_lanes(__m512 value, __m512 inverse_scale, __m512i zero_point) {
  // What is no int32 converts to the smallest one, which is right below and for NaN; above, 255 steps are enough.
  const __m512 steps = at_most(_mm512_set1_ps(255.0f), _mm512_mul_ps(value, inverse_scale));
  const __m512i rounded = _mm512_cvtps_epi32(steps);
  const __m512i shifted = _mm512_add_epi32(rounded, zero_point);
  return _mm512_cvtusepi32_epi8(_mm512_max_epi32(shifted, _mm512_setzero_si512()));
}

struct Affine {
  float scale;
  int zero_point;
};

// What quantizes each image of a batch: the row of a table that belongs to its item. An item may have several images,
// one behind the other: the pixels of a linear.
struct Quantizers {
  const float* scales;
  const int64_t* zero_points;
  const int64_t* rows;  // of each item; null where all take the first
  int64_t table, images_per_item;

  int64_t item(int64_t image) const { return images_per_item == 1 ? image : image / images_per_item; }
  // A row that the table does not have would be read from somewhere else: the nearest it has is taken.
  int64_t row(int64_t image) const {
    if (rows == nullptr) return 0;
    const int64_t row = rows[item(image)];
    return row < 0 ? 0 : (row < table ? row : table - 1);
  }
  Affine operator()(int64_t image) const {
    const int64_t place = row(image);
    return {scales[place], int(zero_points[place])};
  }
};

// One pair of numbers for all images, as a table; it has to outlive what it turns into.
struct SharedQuantizer {
  float scale;
  int64_t zero_point;
  operator Quantizers() const { return {&scale, &zero_point, nullptr, 1, 1}; }
};

// e^x, or e^-x, to about 2^-22: range reduction by powers of two, a polynomial for the rest. |x| is at most 88.
template <bool kNegate>
TFMQ_INLINE __m512 exp_lanes(__m512 x) {
  constexpr float sign = kNegate ? -1.0f : 1.0f;
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(sign * 1.44269504f)), 8);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-sign * 0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(sign * 2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(sign / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(sign / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(sign));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// 1 / x: the 14-bit estimate and one Newton step.
TFMQ_INLINE __m512 reciprocal_lanes(__m512 x) {
  const __m512 estimate = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(2.0f)));
}

TFMQ_INLINE __m512 silu_lanes(__m512 x) {
  const __m512 bounded = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-88.0f)), _mm512_set1_ps(87.0f));
  return _mm512_mul_ps(x, reciprocal_lanes(_mm512_add_ps(_mm512_set1_ps(1.0f), exp_lanes<true>(bounded))));
}

// Adds the products of M rows of bytes with NB * 16 columns to `sums`, over `taps` pieces of `depth` bytes each.
// Row m starts at rows[m] + offsets[tap]; the weight is packed [taps][depth / 4][NB * 16][4].
template <int M, int NB>
TFMQ_INLINE void multiply_tile(const uint8_t* const (&rows)[M], const int64_t* offsets, int64_t taps, int64_t depth,
                               const int8_t* weight, __m512i (&sums)[M * NB]) {
  for (int64_t tap = 0; tap < taps; ++tap) {
    const uint8_t* row[M];
    unroll<M>([&](auto m) __attribute__((always_inline)) { row[m] = rows[m] + offsets[tap]; });
#pragma GCC unroll 4
    for (int64_t c = 0; c < depth; c += 4) {
      __m512i column[NB];
      unroll<NB>([&](auto n) __attribute__((always_inline)) { column[n] = _mm512_loadu_si512(weight + n * 64); });
      weight += NB * 64;
      unroll<M>([&](auto m) __attribute__((always_inline)) {
        int32_t bytes;
        std::memcpy(&bytes, row[m] + c, 4);
        const __m512i activation = _mm512_set1_epi32(bytes);
        // As an intrinsic, the compiler copies the sum before each product.
        unroll<NB>([&](auto n) __attribute__((always_inline)) {
          asm("vpdpbusd %2, %1, %0" : "+v"(sums[m * NB + n]) : "v"(activation), "v"(column[n]));
        });
      });
    }
  }
}

}  // namespace tfmq
