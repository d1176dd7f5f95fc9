// Panels of a product: up to 64 columns of the right operand, rearranged so that the inner loop reads them in order.
//
//   float panel   p[k * width + j] = B(k, j)                          multiplied by fused multiply-adds
//   pair panel    p[k / 2 * width + j] = B(k, j), B(k + 1, j) in bf16  multiplied by vdpbf16ps, two k at a time
//
// width is a multiple of sixteen; missing columns, and the second k of an odd end, are zero. B comes from a source whose
// rows are contiguous. Row j of a linear's weight [N, K] is column j of the product ("by columns": sixteen rows are
// transposed at a time); row k of a weight met as it lies, or of a tensor, is row k of the product ("by rows").
#pragma once

#include "cpu/nf4.h"

namespace fuselora {
namespace FUSELORA_ISA {

constexpr int kPair = 2;

// The first n lanes, the others zero.
template <class T>
static inline Vec load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p, Full{}) : load(p, Tail{int(n)});
}

// A dense matrix of T, the dtype that is computed in.
template <class T>
struct Dense {
  const T* data;
  int64_t stride;
  Vec sixteen(int64_t row, int64_t col, int64_t n) const { return load_some(data + row * stride + col, n); }
#if defined(__AVX512BF16__)
  __m512i words(int64_t row, int64_t col, int64_t n) const {
    const T* p = data + row * stride + col;
    return n >= 2 * kLanes ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << n) - 1), p);
  }
#endif
};

#if defined(__AVX512BF16__)
static inline __m512i to_words(Vec low, Vec high) {
  bf16 words[2 * kLanes];
  store(words, low, Full{});
  store(words + kLanes, high, Full{});
  return _mm512_loadu_si512(words);
}
#endif

// An adapter of S times scale: rounded to T, or what that rounding left.
template <class T, class S>
struct Scaled {
  const S* data;
  int64_t stride;
  Vec scale;
  bool rest;
  Vec sixteen(int64_t row, int64_t col, int64_t n) const {
    const Vec x = load_some(data + row * stride + col, n) * scale;
    return rest ? rounded<T>(x - rounded<T>(x)) : rounded<T>(x);
  }
#if defined(__AVX512BF16__)
  __m512i words(int64_t row, int64_t col, int64_t n) const {
    return to_words(sixteen(row, col, n), n > kLanes ? sixteen(row, col + kLanes, n - kLanes) : splat(0));
  }
#endif
};

// A 4-bit weight, rounded to T. Where rows are a multiple of 32 elements, 32 that begin at a multiple of 32 lie in one
// block and begin with a whole byte.
template <class T>
struct Quantized {
  Scales scales;
  const uint8_t* data;
  int64_t cols;
  Table table;
  Quantized(const Weight4bit& w, int64_t columns) : scales(w), data(w.data), cols(columns), table(w.code) {}

  Vec sixteen(int64_t row, int64_t col, int64_t n) const {
    const int64_t i = row * cols + col;
    if (cols % 32 || n < kLanes) return one_by_one(i, n);
    return rounded<T>(table.at(data + i / 2) * splat(scales.of_element(i)));
  }
  Vec one_by_one(int64_t begin, int64_t n) const {
    float values[kLanes] = {};
    for (int64_t i = begin; i < begin + n && i < begin + kLanes; ++i) {
      const int nibble = i % 2 ? data[i / 2] & 15 : data[i / 2] >> 4;
      values[i - begin] = scales.w.code[nibble] * scales.of_element(i);
    }
    return rounded<T>(load(values, Full{}));
  }
#if defined(__AVX512BF16__)
  // The block's sixteen values in bf16, then one permutation of words gives 32 weights.
  __m512i words(int64_t row, int64_t col, int64_t n) const {
    const int64_t i = row * cols + col;
    if (cols % 32 || n < 2 * kLanes)
      return to_words(one_by_one(i, n), n > kLanes ? one_by_one(i + kLanes, n - kLanes) : splat(0));
    const __m512 scale = _mm512_set1_ps(scales.of_element(i));
    const __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(table.values, scale));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i / 2));
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    // Words in order: high nibble, low nibble. An index has five bits: the values are there twice, and the fifth is free.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
    return _mm512_permutexvar_epi16(index, _mm512_broadcast_i64x4(values));
  }
#endif
};

#if defined(__AVX512F__)
// The 16 x 16 transpose of 32-bit lanes.
static inline void transpose(__m512i r[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + h + 2]);
      r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + h + 2]);
    }
  for (int i = 0; i < 4; ++i) {  // r[4 g + i]: columns i, i + 4, i + 8, i + 12 of rows 4 g to 4 g + 3
    const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

// What is packed: depth k from k0 on, count columns from j0 on, width of the panel.
struct Part {
  int64_t k0, depth, j0, count, width;
};

template <class Source>
static inline void pack_by_rows(const Source& b, const Part& part, float* panel) {
  for (int64_t k = 0; k < part.depth; ++k)
    for (int64_t j = 0; j < part.width; j += kLanes) {
      const int64_t n = part.count - j;
      store(panel + k * part.width + j, n > 0 ? b.sixteen(part.k0 + k, part.j0 + j, n) : splat(0), Full{});
    }
}

template <class Source>
static inline void pack_by_columns(const Source& b, const Part& part, float* panel) {
  for (int64_t j = 0; j < part.width; j += kLanes)
    for (int64_t k = 0; k < part.depth; k += kLanes) {
      const int64_t n = part.depth - k < kLanes ? part.depth - k : kLanes;
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i)
        rows[i] = j + i < part.count ? b.sixteen(part.j0 + j + i, part.k0 + k, n) : splat(0);
#if defined(__AVX512F__)
      transpose(reinterpret_cast<__m512i*>(rows));
      for (int64_t i = 0; i < n; ++i) store(panel + (k + i) * part.width + j, rows[i], Full{});
#else
      float square[kLanes][kLanes];
      for (int i = 0; i < kLanes; ++i) store(square[i], rows[i], Full{});
      for (int64_t i = 0; i < n; ++i)
        for (int l = 0; l < kLanes; ++l) panel[(k + i) * part.width + j + l] = square[l][i];
#endif
    }
}

#if defined(__AVX512BF16__)

template <class Source>
static inline void pack_by_columns(const Source& b, const Part& part, uint32_t* panel) {
  for (int64_t j = 0; j < part.width; j += kLanes)
    for (int64_t k = 0; k < part.depth; k += 2 * kLanes) {
      const int64_t n = part.depth - k < 2 * kLanes ? part.depth - k : 2 * kLanes;
      __m512i rows[kLanes];
      for (int i = 0; i < kLanes; ++i)
        rows[i] = j + i < part.count ? b.words(part.j0 + j + i, part.k0 + k, n) : _mm512_setzero_si512();
      transpose(rows);
      for (int64_t i = 0; i < (n + 1) / 2; ++i) _mm512_storeu_si512(panel + (k / 2 + i) * part.width + j, rows[i]);
    }
}

template <class Source>
static inline void pack_by_rows(const Source& b, const Part& part, uint32_t* panel) {
  alignas(64) uint16_t order[2][2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) {
    order[0][i] = uint16_t(i / 2 + 32 * (i % 2));  // bit 5 chooses the second row
    order[1][i] = uint16_t(order[0][i] + kLanes);
  }
  const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]), zero = _mm512_setzero_si512();
  for (int64_t k = 0; k < part.depth; k += kPair)
    for (int64_t j = 0; j < part.width; j += 2 * kLanes) {
      const int64_t n = part.count - j;
      const __m512i even = n > 0 ? b.words(part.k0 + k, part.j0 + j, n) : zero;
      const __m512i odd = n > 0 && k + 1 < part.depth ? b.words(part.k0 + k + 1, part.j0 + j, n) : zero;
      uint32_t* out = panel + k / 2 * part.width + j;
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, first, odd));
      if (j + kLanes < part.width) _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(even, second, odd));
    }
}

#endif

}  // namespace FUSELORA_ISA
}  // namespace fuselora
