// Sixteen fp32 lanes with the same interface on every instruction set, and the storage types bf16 and fp16.
// Sixteen everywhere makes sums associate the same way: avx2 (2 registers) and avx512 (1) give the same bits; scalar (an
// array that the compiler may vectorise) differs only where it has no fused multiply-add.
// keep(x, words, threshold) zeroes the lanes whose word is below the threshold.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fuselora {
namespace FUSELORA_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr int kLanes = 16;

// All sixteen lanes, or the first n of them at the end of a row.
struct Full {};
struct Tail {
  int n;
};

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
static inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec keep(Vec x, const uint32_t* words, uint32_t threshold) {
  const __mmask16 kept = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(int32_t(threshold)));
  return {_mm512_maskz_mov_ps(kept, x.v)};
}
static inline Vec load(const float* p, Full) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, Vec x, Full) { _mm512_storeu_ps(p, x.v); }
static inline Vec load(const bf16* p, Full) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
// fp32 bits with the upper halves rounded to nearest even; the lower halves are left over. NaN stays NaN, made quiet.
static inline __m512i nearest_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
}
static inline __m256i narrow_bf16(__m512 x) {
#if defined(__AVX512BF16__)
  // One instruction instead of nine with the same bits, but it takes subnormals for zeros.
  constexpr int subnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(x, subnormal) == 0, 1)) return (__m256i)_mm512_cvtneps_pbh(x);
#endif
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest_bf16(x), 16));
}
static inline void store(bf16* p, Vec x, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x.v));
}
static inline Vec round_bf16(Vec x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(nearest_bf16(x.v), _mm512_set1_epi32(int32_t(0xffff0000))))};
}
static inline Vec load(const fp16* p, Full) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline void store(fp16* p, Vec x, Full) {
  const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

#elif defined(__AVX2__)

struct Vec {
  __m256 lo, hi;
};
static inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline __m256 keep8(__m256 x, const uint32_t* words, uint32_t threshold) {
  const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  // word >= threshold without an unsigned comparison: the larger of the two is word.
  const __m256i larger = _mm256_max_epu32(word, _mm256_set1_epi32(int32_t(threshold)));
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(larger, word)));
}
static inline Vec keep(Vec x, const uint32_t* words, uint32_t threshold) {
  return {keep8(x.lo, words, threshold), keep8(x.hi, words + 8, threshold)};
}
static inline Vec load(const float* p, Full) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, Vec x, Full) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
static inline __m128i load8(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
static inline __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
// As nearest_bf16 above, for eight lanes.
static inline __m256i nearest_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(even, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
static inline __m256 truncate(__m256i bits) {
  return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int32_t(0xffff0000))));
}
static inline Vec round_bf16(Vec x) { return {truncate(nearest_bf16(x.lo)), truncate(nearest_bf16(x.hi))}; }
static inline Vec load(const bf16* p, Full) { return {widen(load8(p)), widen(load8(p + 8))}; }
static inline void store(bf16* p, Vec x, Full) {
  // packus works within 128-bit halves; the permutation restores the order.
  const __m256i lo = _mm256_srli_epi32(nearest_bf16(x.lo), 16), hi = _mm256_srli_epi32(nearest_bf16(x.hi), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
static inline Vec load(const fp16* p, Full) { return {_mm256_cvtph_ps(load8(p)), _mm256_cvtph_ps(load8(p + 8))}; }
static inline void store(fp16* p, Vec x, Full) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lo, nearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.hi, nearest));
}

#else

struct Vec {
  float v[kLanes];
};
static inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
static inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline float widen(float x) { return x; }
static inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
static inline float widen(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // 2^-24 is the smallest subnormal; above, shift the fields and move the exponent bias from 15 to 127.
  const float magnitude = rest < 0x400 ? float(rest) * 5.9604644775390625e-8f : float_of((rest << 13) + (112u << 23));
  return float_of(sign | bits_of(magnitude));
}
static inline void narrow(float x, float* out) { *out = x; }
static inline void narrow(float x, bf16* out) {
  const uint32_t bits = bits_of(x);
  out->bits = x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline void narrow(float x, fp16* out) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, bits = bits_of(x) & 0x7fffffff;
  if (bits > 0x7f800000) {
    out->bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520, the first value that rounds to infinity
    out->bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end of the sum
    out->bits = sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000);
  } else {
    out->bits = sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
}
#define FUSELORA_LANEWISE(expression)                           \
  Vec r;                                                        \
  for (int i = 0; i < kLanes; ++i) r.v[i] = (expression);       \
  return r
static inline Vec splat(float x) { FUSELORA_LANEWISE(x); }
static inline Vec operator+(const Vec& a, const Vec& b) { FUSELORA_LANEWISE(a.v[i] + b.v[i]); }
static inline Vec operator-(const Vec& a, const Vec& b) { FUSELORA_LANEWISE(a.v[i] - b.v[i]); }
static inline Vec operator*(const Vec& a, const Vec& b) { FUSELORA_LANEWISE(a.v[i] * b.v[i]); }
static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { FUSELORA_LANEWISE(a.v[i] * b.v[i] + c.v[i]); }
static inline Vec keep(const Vec& x, const uint32_t* words, uint32_t threshold) {
  FUSELORA_LANEWISE(words[i] >= threshold ? x.v[i] : 0.f);
}
template <class T>
static inline Vec load(const T* p, Full) { FUSELORA_LANEWISE(widen(p[i])); }
template <class T>
static inline void store(T* p, const Vec& x, Full) {
  for (int i = 0; i < kLanes; ++i) narrow(x.v[i], p + i);
}
#undef FUSELORA_LANEWISE

#endif

template <class T>
static inline Vec load(const T* p, Tail tail) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, tail.n * sizeof(T));
  return load(lanes, Full{});
}

template <class T>
static inline void store(T* p, Vec x, Tail tail) {
  T lanes[kLanes];
  store(lanes, x, Full{});
  std::memcpy(p, lanes, tail.n * sizeof(T));
}

// x rounded to T and widened again.
template <class T>
static inline Vec rounded(Vec x) {
  T lanes[kLanes];
  store(lanes, x, Full{});
  return load(lanes, Full{});
}
template <>
inline Vec rounded<float>(Vec x) {
  return x;
}
#if defined(__AVX2__)
template <>
inline Vec rounded<bf16>(Vec x) {
  return round_bf16(x);
}
#endif

static inline float sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x, Full{});
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// body(j, lanes) for every group of sixteen columns, the last one perhaps short.
template <class Body>
static inline void each(int64_t cols, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) body(j, Full{});
  if (j < cols) body(j, Tail{int(cols - j)});
}

// The sum over columns of what body(accumulator, j, lanes) adds; four accumulators hide the latency of the addition.
// Lanes beyond a short end must add zero, which loads give by themselves.
template <class Body>
static inline float reduce(int64_t cols, Body body) {
  Vec a = splat(0), b = a, c = a, d = a;
  int64_t j = 0;
  for (; j + 4 * kLanes <= cols; j += 4 * kLanes) {
    a = body(a, j, Full{});
    b = body(b, j + kLanes, Full{});
    c = body(c, j + 2 * kLanes, Full{});
    d = body(d, j + 3 * kLanes, Full{});
  }
  for (; j + kLanes <= cols; j += kLanes) a = body(a, j, Full{});
  if (j < cols) b = body(b, j, Tail{int(cols - j)});
  return sum((a + b) + (c + d));
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
