// Integer attention: softmax(q k' * factor) v with both products on bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "vnni.h"

namespace tfmq {

struct AttentionShape {
  int64_t batch, heads, queries, keys, depth;  // depth is a multiple of 4
  int64_t key_batch, key_heads;                // of keys and values: batch or 1; a divisor of heads, each serves as many
  int64_t query[3], key[3], value[3];          // strides of batch, head and row, 0 to repeat; the depth is contiguous
};

// What quantizes query, key, softmax and value: tables of four columns, by the rows of Quantizers.
struct AttentionQuantizers {
  Quantizers rows;

  Affine operator()(int64_t image, int operand) const {
    const int64_t place = 4 * rows.row(image) + operand;
    return {rows.scales[place], int(rows.zero_points[place])};
  }
};

// One row for all images; it has to outlive what it turns into.
struct SharedAttentionQuantizers {
  float scales[4];
  int64_t zero_points[4];
  operator AttentionQuantizers() const { return {{scales, zero_points, nullptr, 1, 1}}; }
};

enum Operand { kQuery, kKey, kSoftmax, kValue };

constexpr int kQueryRows = 6;

TFMQ_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

TFMQ_INLINE __mmask16 tail_mask(int64_t left) { return left >= kLanes ? 0xffff : __mmask16((1u << left) - 1); }

TFMQ_INLINE __m512 load_masked(const float* source, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, source); }

TFMQ_INLINE __m512 load_masked(const bf16* source, __mmask16 mask) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, source);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

TFMQ_INLINE void store_masked(float* target, __m512 value, __mmask16 mask) { _mm512_mask_storeu_ps(target, mask, value); }

TFMQ_INLINE void store_masked(bf16* target, __m512 value, __mmask16 mask) {
  alignas(64) bf16 whole[kLanes];
  store_lanes(whole, value);
  _mm256_mask_storeu_epi16(target, mask, _mm256_load_si256(reinterpret_cast<const __m256i*>(whole)));
}

// Calls body(NB, first column) for blocks of 4, 2 or 1 vectors that cover `columns`, a multiple of 16.
template <class F>
TFMQ_INLINE void over_column_blocks(int64_t columns, F&& body) {
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) body(std::integral_constant<int, 4>{}, c);
  for (; c + 32 <= columns; c += 32) body(std::integral_constant<int, 2>{}, c);
  for (; c < columns; c += 16) body(std::integral_constant<int, 1>{}, c);
}

// Where column c of a packed matrix starts, and how wide its block is: [block][depth / 4][width][4].
TFMQ_INLINE void place_of_column(int64_t c, int64_t columns, int64_t depth, int64_t& start, int64_t& width) {
  const int64_t whole = columns / 64 * 64;
  if (c < whole) {
    width = 64, start = c / 64 * 64 * depth + c % 64 * 4;
  } else if (c < whole + (columns - whole) / 32 * 32) {
    width = 32, start = whole * depth + (c - whole) * 4;
  } else {
    const int64_t before = whole + (columns - whole) / 32 * 32;
    width = 16, start = before * depth + (c - before) * 4;
  }
}

// Quantizes `depth` values to bytes; returns their sum.
template <class In>
TFMQ_INLINE int32_t quantize_row(const In* source, uint8_t* target, int64_t depth, float factor, Affine q) {
  const __m512 by = _mm512_set1_ps(factor), inverse = _mm512_set1_ps(inverse_of(q.scale));
  const __m512i zero = _mm512_set1_epi32(q.zero_point);
  __m128i sums = _mm_setzero_si128();
  for (int64_t c = 0; c < depth; c += kLanes) {
    const __mmask16 mask = tail_mask(depth - c);
    const __m128i whole = quantize_lanes(_mm512_mul_ps(load_masked(source + c, mask), by), inverse, zero);
    const __m128i bytes = _mm_maskz_mov_epi8(mask, whole);
    _mm_mask_storeu_epi8(target + c, mask, bytes);
    sums = _mm_add_epi64(sums, _mm_sad_epu8(bytes, _mm_setzero_si128()));
  }
  return static_cast<int32_t>(_mm_extract_epi64(sums, 0) + _mm_extract_epi64(sums, 1));
}

// Packs 16 keys, `first` and on, as columns of the first product, as signed bytes; sums[key] is the sum of each.
template <class In>
inline void pack_keys(const In* keys, int64_t first, int64_t count, int64_t stride, int64_t depth, Affine q,
                      uint8_t* rows, int8_t* packed, int32_t* sums) {
  const int64_t pitch = round_up(depth, 4);
  std::memset(rows, 128, kLanes * pitch);
  for (int64_t i = 0; i < kLanes && first + i < count; ++i)
    quantize_row(keys + (first + i) * stride, rows + i * pitch, depth, 1.0f, q);
  int64_t start, width;
  place_of_column(first, round_up(count, kLanes), depth, start, width);
  const __m512i places = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(int32_t(pitch)));
  const __m512i half = _mm512_set1_epi8(-128), ones = _mm512_set1_epi8(1);
  __m512i total = _mm512_setzero_si512();
  for (int64_t c = 0; c < depth; c += 4) {
    const __m512i bytes = _mm512_xor_si512(_mm512_i32gather_epi32(places, rows + c, 1), half);
    _mm512_storeu_si512(packed + start + c * width, bytes);
    total = _mm512_dpbusd_epi32(total, ones, bytes);
  }
  _mm512_storeu_si512(sums + first, total);
}

// Packs 4 keys, `first` and on, of the second product's weight: its depth is the keys, padded with zeros.
template <class In>
inline void pack_values(const In* values, int64_t first, int64_t count, int64_t stride, int64_t depth, Affine q,
                        uint8_t* rows, int8_t* packed) {
  const int64_t padded = round_up(count, kLanes), columns = round_up(depth, kLanes);
  std::memset(rows, 128, 4 * columns);
  for (int64_t i = 0; i < 4 && first + i < count; ++i)
    quantize_row(values + (first + i) * stride, rows + i * columns, depth, 1.0f, q);
  const __m128i half = _mm_set1_epi8(-128);
  for (int64_t c = 0; c < columns; c += kLanes) {
    __m128i row[4];
    for (int i = 0; i < 4; ++i)
      row[i] = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * columns + c)), half);
    const __m128i low = _mm_unpacklo_epi8(row[0], row[1]), high = _mm_unpackhi_epi8(row[0], row[1]);
    const __m128i low2 = _mm_unpacklo_epi8(row[2], row[3]), high2 = _mm_unpackhi_epi8(row[2], row[3]);
    int64_t start, width;
    place_of_column(c, columns, padded, start, width);
    __m128i* target = reinterpret_cast<__m128i*>(packed + start + first * width);
    _mm_storeu_si128(target, _mm_unpacklo_epi16(low, low2));
    _mm_storeu_si128(target + 1, _mm_unpackhi_epi16(low, low2));
    _mm_storeu_si128(target + 2, _mm_unpacklo_epi16(high, high2));
    _mm_storeu_si128(target + 3, _mm_unpackhi_epi16(high, high2));
  }
}

// sums = rows * packed, by blocks of columns; body(NB, column, sums) takes each block.
template <class F>
TFMQ_INLINE void multiply_rows(const uint8_t* rows, int64_t row_stride, int64_t depth, const int8_t* packed,
                               int64_t columns, F&& body) {
  const uint8_t* starts[kQueryRows];
  unroll<kQueryRows>([&](auto m) __attribute__((always_inline)) { starts[m] = rows + m * row_stride; });
  const int64_t none = 0;
  over_column_blocks(columns, [&](auto blocks, int64_t c) __attribute__((always_inline)) {
    constexpr int kBlocks = decltype(blocks)::value;
    __m512i sums[kQueryRows * kBlocks];
    unroll<kQueryRows * kBlocks>([&](auto i) __attribute__((always_inline)) { sums[i] = _mm512_setzero_si512(); });
    multiply_tile<kQueryRows, kBlocks>(starts, &none, 1, depth, packed + c * depth, sums);
    body(blocks, c, sums);
  });
}

// One row of scores to bytes: quantize(softmax(scores)), or where the division is deferred, of its numerators.
// Returns the sum of the bytes.
inline int32_t softmax_row(float* scores, uint8_t* weights, int64_t keys, int64_t padded, Affine q, bool deferred) {
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t c = 0; c < keys; c += kLanes)
    top = _mm512_mask_max_ps(top, tail_mask(keys - c), top, _mm512_loadu_ps(scores + c));
  const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < keys; c += kLanes) {
    const __m512 below = _mm512_max_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + c), highest), _mm512_set1_ps(-87.0f));
    const __m512 e = _mm512_maskz_mov_ps(tail_mask(keys - c), exp_lanes<false>(below));
    _mm512_storeu_ps(scores + c, e);
    total = _mm512_add_ps(total, e);
  }
  const __m512 by = _mm512_set1_ps(deferred ? 1.0f : 1.0f / _mm512_reduce_add_ps(total));
  const __m512 inverse = _mm512_set1_ps(inverse_of(q.scale));
  __m512i sum = _mm512_setzero_si512();
  for (int64_t c = 0; c < padded; c += kLanes) {
    const __m128i bytes = quantize_lanes(_mm512_mul_ps(_mm512_loadu_ps(scores + c), by), inverse, _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(weights + c), bytes);
    sum = _mm512_add_epi32(sum, _mm512_cvtepu8_epi32(bytes));
  }
  return _mm512_reduce_add_epi32(sum);
}

// out[batch, query, head, depth]. The weights' zero point is 0; `factor` multiplies the query before quantization.
// `deferred`: the weights are the numerators of the softmax, and the result is divided by their sum.
// Keys and values are packed once for all images and heads that share them: where all images do, with the first's row.
template <class In>
void integer_attention(const In* query, const In* key, const In* value, In* out, const AttentionShape& s, float factor,
                       const AttentionQuantizers& quantizers, bool deferred) {
  const int64_t padded = round_up(s.keys, kLanes), columns = round_up(s.depth, kLanes);
  const int64_t pairs = s.batch * s.heads, sources = s.key_batch * s.key_heads, sharing = s.heads / s.key_heads;
  std::unique_ptr<int8_t[]> packed_keys(new int8_t[sources * padded * s.depth]);
  std::unique_ptr<int8_t[]> packed_values(new int8_t[sources * padded * columns]);
  std::unique_ptr<int32_t[]> key_sums(new int32_t[sources * padded]);
  const int64_t tiles = (s.queries + kQueryRows - 1) / kQueryRows;
#pragma omp parallel
  {
    std::unique_ptr<uint8_t[]> staged(new uint8_t[kLanes * columns]);
#pragma omp for schedule(static)
    for (int64_t job = 0; job < sources * (padded / kLanes); ++job) {
      const int64_t source = job / (padded / kLanes), first = job % (padded / kLanes) * kLanes;
      const int64_t image = source / s.key_heads, head = source % s.key_heads;
      const Affine k = quantizers(image, kKey), v = quantizers(image, kValue);
      pack_keys(key + image * s.key[0] + head * s.key[1], first, s.keys, s.key[2], s.depth, k, staged.get(),
                packed_keys.get() + source * padded * s.depth, key_sums.get() + source * padded);
      for (int64_t four = first; four < first + kLanes; four += 4)
        pack_values(value + image * s.value[0] + head * s.value[1], four, s.keys, s.value[2], s.depth, v, staged.get(),
                    packed_values.get() + source * padded * columns);
    }
    std::unique_ptr<uint8_t[]> rows(new uint8_t[kQueryRows * s.depth]);
    std::unique_ptr<float[]> scores(new float[kQueryRows * padded]);
    std::unique_ptr<uint8_t[]> weights(new uint8_t[kQueryRows * padded]);
#pragma omp for schedule(static)
    for (int64_t job = 0; job < pairs * tiles; ++job) {
      const int64_t pair = job / tiles, first = job % tiles * kQueryRows, image = pair / s.heads, head = pair % s.heads;
      const int64_t source = (s.key_batch == 1 ? 0 : image) * s.key_heads + head / sharing;
      const int64_t count = std::min<int64_t>(kQueryRows, s.queries - first);
      const Affine q = quantizers(image, kQuery), k = quantizers(image, kKey);
      const Affine w = quantizers(image, kSoftmax), v = quantizers(image, kValue);
      const int key_zero = k.zero_point - 128, value_zero = v.zero_point - 128;
      int32_t row_sums[kQueryRows], weight_sums[kQueryRows];
      for (int64_t m = 0; m < kQueryRows; ++m) {
        const In* row = query + image * s.query[0] + head * s.query[1] + (first + std::min(m, count - 1)) * s.query[2];
        row_sums[m] = quantize_row(row, rows.get() + m * s.depth, s.depth, factor, q);
      }
      const int32_t* sums_of_keys = key_sums.get() + source * padded;
      const __m512 scale = _mm512_set1_ps(q.scale * k.scale);
      multiply_rows(rows.get(), s.depth, s.depth, packed_keys.get() + source * padded * s.depth, padded,
                    [&](auto blocks, int64_t c, auto& sums) __attribute__((always_inline)) {
        constexpr int kBlocks = decltype(blocks)::value;
        unroll<kBlocks>([&](auto n) __attribute__((always_inline)) {
          const __m512i of_keys = _mm512_mullo_epi32(_mm512_loadu_si512(sums_of_keys + c + n * kLanes), _mm512_set1_epi32(q.zero_point));
          unroll<kQueryRows>([&](auto m) __attribute__((always_inline)) {
            const int32_t constant = int32_t(s.depth) * q.zero_point * key_zero - key_zero * row_sums[m];
            const __m512i exact = _mm512_add_epi32(_mm512_sub_epi32(sums[m * kBlocks + n], of_keys), _mm512_set1_epi32(constant));
            _mm512_storeu_ps(scores.get() + m * padded + c + n * kLanes, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale));
          });
        });
      });
      for (int m = 0; m < kQueryRows; ++m)
        weight_sums[m] = softmax_row(scores.get() + m * padded, weights.get() + m * padded, s.keys, padded, w, deferred);
      In* target = out + ((image * s.queries + first) * s.heads + head) * s.depth;
      __m512 out_scale[kQueryRows];
      for (int m = 0; m < kQueryRows; ++m)
        out_scale[m] = _mm512_set1_ps(deferred ? v.scale / float(weight_sums[m]) : w.scale * v.scale);
      multiply_rows(weights.get(), padded, padded, packed_values.get() + source * padded * columns, columns,
                    [&](auto blocks, int64_t c, auto& sums) __attribute__((always_inline)) {
        constexpr int kBlocks = decltype(blocks)::value;
        unroll<kQueryRows>([&](auto m) __attribute__((always_inline)) {
          if (m < count) {
            unroll<kBlocks>([&](auto n) __attribute__((always_inline)) {
              const __m512i exact = _mm512_sub_epi32(sums[m * kBlocks + n], _mm512_set1_epi32(value_zero * weight_sums[m]));
              store_masked(target + m * s.heads * s.depth + c + n * kLanes, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), out_scale[m]),
                           tail_mask(std::max<int64_t>(0, s.depth - c - n * kLanes)));
            });
          }
        });
      });
    }
  }
}

}  // namespace tfmq
