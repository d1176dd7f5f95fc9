// The pieces that attention is made of: a matrix product on small row-major tiles, the packing of its operands, and the
// exponential. In every tile a vector's lanes are sixteen queries, so maxima, sums and masks are vertical.
//
// Products run on 32-bit words: one fp32, or with AVX-512 BF16 two neighbours of the summed dimension as bf16, of which
// vdpbf16ps adds both products to an fp32 lane. A left operand is read a word at a time from rows as they lie in
// memory; a right one in vectors of words. With AMX both are read in tiles.
#pragma once

#include "cpu/attention_amx.h"
#include "cpu/kernels.h"
#include "cpu/vec_math.h"

namespace fuselora {
namespace FUSELORA_ISA {

// Rows and vectors of the product's block: as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockVecs = 4;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6, kBlockVecs = 1;
#else
constexpr int kBlockRows = 2, kBlockVecs = 1;
#endif

constexpr float kHidden = -1e30f;   // a score that no query may see
constexpr float kNothing = -1e29f;  // the maximum of no scores

static inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The operands' element for storage T.
template <class T>
struct OperandOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

// Elements in a word, and the words that hold n elements.
template <class E>
constexpr int64_t kPack = sizeof(float) / sizeof(E);
template <class E>
static inline int64_t words(int64_t n) {
  return ceil_div(n, kPack<E>);
}

static inline Vec broadcast(const void* word) {
  float x;
  std::memcpy(&x, word, sizeof x);
  return splat(x);
}

template <class E>
static inline Vec dot(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if (sizeof(E) == 2)
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
#endif
  return fma(a, b, sum);
}

// What the product does with the values that are in c: overwrite them, add to them, or multiply them by a factor for
// each column first.
struct Into {
  bool add;
  const float* factor;
};
constexpr Into kOverwrite{false, nullptr}, kAdd{true, nullptr};

// The tile's sum is added to c as a whole: a sum of sums, whose rounding grows with the square root of each level's
// length.
template <class E, int rows, int vecs>
static void block(int64_t depth, const E* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                  Into into) {
  Vec sum[rows][vecs];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) sum[r][v] = splat(0.f);
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[vecs];
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) right[v] = load(b + k * ldb + v * kLanes, Full{});
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec left = broadcast(a + r * lda + k * kPack<E>);
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) sum[r][v] = dot<E>(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) {
      float* at = c + r * ldc + v * kLanes;
      if (into.factor) {
        sum[r][v] = fma(load(at, Full{}), load(into.factor + v * kLanes, Full{}), sum[r][v]);
      } else if (into.add) {
        sum[r][v] = load(at, Full{}) + sum[r][v];
      }
      store(at, sum[r][v], Full{});
    }
}

template <class E, int rows, int vecs>
static void last_rows(int64_t left, int64_t depth, const E* a, int64_t lda, const float* b, int64_t ldb, float* c,
                      int64_t ldc, Into into) {
  if constexpr (rows > 0) {
    if (left == rows) return block<E, rows, vecs>(depth, a, lda, b, ldb, c, ldc, into);
    last_rows<E, rows - 1, vecs>(left, depth, a, lda, b, ldb, c, ldc, into);
  }
}

template <class E, int vecs>
static void columns(int64_t m, int64_t depth, const E* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, Into into) {
  int64_t i = 0;
  for (; i + kBlockRows <= m; i += kBlockRows)
    block<E, kBlockRows, vecs>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, into);
  last_rows<E, kBlockRows - 1, vecs>(m - i, depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, into);
}

template <class E>
static void segment(int64_t m, int64_t vecs, int64_t depth, const E* a, int64_t lda, const float* b, int64_t ldb,
                    float* c, int64_t ldc, Into into) {
  // Five vectors are three and two, not four and one: one vector by six rows waits for its own sums.
  const int64_t parts = ceil_div(vecs, kBlockVecs);
  for (int64_t part = 0, v = 0; part < parts; ++part) {
    const int64_t count = ceil_div(vecs - v, parts - part), at = v * kLanes;
    const Into here{into.add, into.factor ? into.factor + at : nullptr};
    if (count == 1) columns<E, 1>(m, depth, a, lda, b + at, ldb, c + at, ldc, here);
#if defined(__AVX512F__)
    if (count == 2) columns<E, 2>(m, depth, a, lda, b + at, ldb, c + at, ldc, here);
    if (count == 3) columns<E, 3>(m, depth, a, lda, b + at, ldb, c + at, ldc, here);
    if (count == 4) columns<E, 4>(m, depth, a, lda, b + at, ldb, c + at, ldc, here);
#endif
    v += count;
  }
}

// Words that a sum adds up before it joins the others: fp32 operands leave no other error than the sums'.
template <class E>
constexpr int64_t kSegment = kPack<E> == 1 ? 32 : 1 << 20;

// c [m, 16 vecs] = a [m, depth words] b [depth words, 16 vecs]; strides in elements (a) and words (b, c).
template <class E>
static void product(int64_t m, int64_t vecs, int64_t depth, const E* a, int64_t lda, const float* b, int64_t ldb,
                    float* c, int64_t ldc, Into into) {
#if defined(FUSELORA_TILES)
  if constexpr (kPack<E> == 2) return tile_product(m, vecs, depth, a, lda, b, ldb, c, ldc, into.add, into.factor);
#endif
  for (int64_t k = 0; k < depth; k += kSegment<E>) {
    const int64_t some = smaller(kSegment<E>, depth - k);
    segment<E>(m, vecs, some, a + k * kPack<E>, lda, b + k * ldb, ldb, c, ldc, k ? kAdd : into);
  }
}

// to[j][i] = from[i][j], sixteen by sixteen words.
#if defined(__AVX512F__)
static inline void transpose16(const float* from, int64_t lds, float* to, int64_t ldd) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * lds);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  // r[4 g + c] holds columns c, 4 + c, 8 + c and 12 + c of rows 4 g to 4 g + 3, one in each 128-bit part.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * ldd, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(to + (4 + c) * ldd, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(to + (8 + c) * ldd, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_storeu_ps(to + (12 + c) * ldd, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}
#else
static inline void transpose16(const float* from, int64_t lds, float* to, int64_t ldd) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * ldd + i] = from[i * lds + j];
}
#endif

// Sixteen values from p, of which only the first n are there; the others are zero.
template <class T>
static inline Vec load_some(const T* p, int64_t n) {
  if (n >= kLanes) return load(p, Full{});
  return n > 0 ? load(p, Tail{int(n)}) : splat(0.f);
}

template <class T>
static inline void store_some(T* p, Vec x, int64_t n) {
  n >= kLanes ? store(p, x, Full{}) : store(p, x, Tail{int(n)});
}

// Sixteen words along a row, starting at p: fp32 values, or pairs as they lie.
template <class E, class T>
static inline void row_words(const T* p, int64_t n, float* to) {
  if constexpr (kPack<E> == 1) {
    store(to, load_some(p, n), Full{});
  } else {
    if (n >= 2 * kLanes) {
      std::memcpy(to, p, 2 * kLanes * sizeof(T));
    } else {
      std::memset(to, 0, kLanes * sizeof(float));
      if (n > 0) std::memcpy(to, p, size_t(n) * sizeof(T));
    }
  }
}

// Sixteen words across rows: element j of p, or of the pair p and p + stride. rows: how many of the pair are there.
template <class E, class T>
static inline void column_words(const T* p, int64_t stride, int64_t rows, int64_t n, float* to) {
  if constexpr (kPack<E> == 1) {
    store(to, rows > 0 ? load_some(p, n) : splat(0.f), Full{});
  } else {
    // bf16 widened is the element in the upper half of a word.
    const Vec first = rows > 0 ? load_some(p, n) : splat(0.f);
    const Vec second = rows > 1 ? load_some(p + stride, n) : splat(0.f);
#if defined(__AVX512F__)
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first.v), 16);
    _mm512_storeu_ps(to, _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(second.v))));
#endif
  }
}

// Right operand of a product that sums over a row's elements: to [words of width, kQueries] from x [rows, width].
template <class E, class T>
static void pack_across(const T* x, int64_t stride, int64_t rows, int64_t width, float* to) {
  alignas(64) float tile[kLanes * kLanes], turned[kLanes * kLanes];
  const int64_t all = words<E>(width);
  for (int64_t w = 0; w < all; w += kLanes) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t left = i + r < rows ? width - w * kPack<E> : 0;
        row_words<E>(left ? x + (i + r) * stride + w * kPack<E> : x, left, tile + r * kLanes);
      }
      transpose16(tile, kLanes, turned, kLanes);
      for (int64_t j = 0; j < smaller(kLanes, all - w); ++j)
        std::memcpy(to + (w + j) * kQueries + i, turned + j * kLanes, kLanes * sizeof(float));
    }
  }
}

// Right operand of a product that sums over rows: to [words of rows, padded] from x [rows, width].
template <class E, class T>
static void pack_along(const T* x, int64_t stride, int64_t rows, int64_t width, int64_t padded, float* to) {
  for (int64_t i = 0; i < ceil_div(rows, kLanes) * kLanes; i += kPack<E>)
    for (int64_t j = 0; j < padded; j += kLanes)
      column_words<E>(i < rows ? x + i * stride + j : x, stride, rows - i, width - j, to + i / kPack<E> * padded + j);
}

// Left operand of a product that sums over keys: to [width, kKeys] elements from x [keys, width], then zeros.
template <class E, class T>
static void pack_turned(const T* x, int64_t stride, int64_t keys, int64_t width, E* to) {
  alignas(64) float tile[kLanes * kLanes], turned[kLanes * kLanes];
  for (int64_t k = 0; k < kKeys; k += kLanes * kPack<E>) {
    for (int64_t j = 0; j < width; j += kLanes) {
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t key = k + r * kPack<E>;
        column_words<E>(key < keys ? x + key * stride + j : x, stride, keys - key, width - j, tile + r * kLanes);
      }
      transpose16(tile, kLanes, turned, kLanes);
      for (int64_t i = 0; i < smaller(kLanes, width - j); ++i)
        std::memcpy(to + (j + i) * kKeys + k, turned + i * kLanes, kLanes * sizeof(float));
    }
  }
}

// to [rows, width] = x [rows, width], widened.
template <class T>
static void widen_rows(const T* x, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    each(width, [&](int64_t j, auto lanes) { store(to + i * width + j, load(x + i * stride + j, lanes), lanes); });
}

// Two rows of a right operand that sums over rows, at one vector of columns.
template <class E>
static inline void store_rows(float* to, int64_t row, int64_t column, Vec first, Vec second) {
  if constexpr (kPack<E> == 1) {
    store(to + row * kQueries + column, first, Full{});
    store(to + (row + 1) * kQueries + column, second, Full{});
  } else {
#if defined(__AVX512BF16__)
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
    _mm512_storeu_si512(to + row / 2 * kQueries + column, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
#endif
  }
}

// Two rows of a left operand, `stride` elements apart, at one vector of columns.
template <class E>
static inline void store_pair(E* to, int64_t stride, Vec first, Vec second) {
#if defined(__AVX512BF16__)
  if constexpr (kPack<E> == 2) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + stride), _mm512_extracti64x4_epi64(both, 1));
    return;
  }
#endif
  store(to, first, Full{});
  store(to + stride, second, Full{});
}

// base^x: base 2 where results are rounded to bf16, else e. kLog is the logarithm of e to that base.
template <class E>
constexpr double kLogExact = sizeof(E) == 2 ? 1.4426950408889634 : 1.0;
template <class E>
constexpr float kLog = float(kLogExact<E>);

// 2^x = 2^floor(x) 2^r with a minimax polynomial on [0, 1), 9e-8 off: weights are rounded to bf16, but their sum is not.
template <class E>
static inline Vec power(Vec x) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(E) == 2) {
    constexpr float p[] = {0.99999994f, 0.693153083f, 0.240153611f, 0.0558263175f, 0.00898934063f, 0.00187757669f};
    const Vec r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
    return {_mm512_scalef_ps(polynomial(p, r).v, x.v)};
  }
#endif
  return exp(x);
}

// power(x unit + offset). Where results stay fp32 the product is rounded by itself, as it was in the offset, so that
// the weight of the only key of a query is exactly 1.
template <class E>
static inline Vec power_of(Vec x, Vec unit, Vec offset) {
  return power<E>(kPack<E> == 1 ? x * unit + offset : fma(x, unit, offset));
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
