// exp, tanh, the logistic function and the normal distribution on sixteen lanes.
// The polynomials are minimax fits (reweighted least squares on Chebyshev points, 40 digits), rounded to fp32; the errors
// in the comments are relative and in units of 2^-24, for exact arithmetic. NaN gives NaN, and avx2 and avx512 give the
// same bits: the lane operations here round as IEEE 754 says.
#pragma once

#include "cpu/vec.h"

namespace fuselora {
namespace FUSELORA_ISA {

// maximum and minimum give b when a lane of a or b is NaN. select: a where x < limit, else b, also where x is NaN.
// power2(x, t): x * 2^n for t = 1.5 * 2^23 + n, |n| <= 252, rounded once.
constexpr float kRoundToInteger = 12582912.f;  // 1.5 * 2^23: added to |x| < 2^22, leaves x's nearest integer in the low bits

#if defined(__AVX512F__)

static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Vec square_root(Vec x) { return {_mm512_sqrt_ps(x.v)}; }
static inline Vec magnitude(Vec x) { return {_mm512_abs_ps(x.v)}; }
static inline Vec select(Vec x, Vec limit, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), b.v, a.v)};
}
static inline Vec with_sign(Vec x, Vec sign) { return {_mm512_or_ps(x.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.f)))}; }
static inline Vec power2(Vec x, Vec t) {
  return {_mm512_scalef_ps(x.v, _mm512_sub_ps(t.v, _mm512_set1_ps(kRoundToInteger)))};
}

#elif defined(__AVX2__)

static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
static inline Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static inline Vec square_root(Vec x) { return {_mm256_sqrt_ps(x.lo), _mm256_sqrt_ps(x.hi)}; }
static inline Vec magnitude(Vec x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.lo), _mm256_andnot_ps(sign, x.hi)};
}
static inline Vec select(Vec x, Vec limit, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, limit.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, limit.hi, _CMP_LT_OQ))};
}
static inline Vec with_sign(Vec x, Vec sign) {
  const __m256 mask = _mm256_set1_ps(-0.f);
  return {_mm256_or_ps(x.lo, _mm256_and_ps(sign.lo, mask)), _mm256_or_ps(x.hi, _mm256_and_ps(sign.hi, mask))};
}
// In two halves: 2^n alone would leave the range of normal numbers; only the second product can round.
static inline __m256 power2_8(__m256 x, __m256 t) {
  const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_castps_si256(_mm256_set1_ps(kRoundToInteger)));
  const __m256i half = _mm256_srai_epi32(n, 1), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
static inline Vec power2(Vec x, Vec t) { return {power2_8(x.lo, t.lo), power2_8(x.hi, t.hi)}; }

#else

#define FUSELORA_LANEWISE(expression)                           \
  Vec r;                                                        \
  for (int i = 0; i < kLanes; ++i) r.v[i] = (expression);       \
  return r
static inline Vec operator/(const Vec& a, const Vec& b) { FUSELORA_LANEWISE(a.v[i] / b.v[i]); }
static inline Vec maximum(const Vec& a, const Vec& b) { FUSELORA_LANEWISE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline Vec minimum(const Vec& a, const Vec& b) { FUSELORA_LANEWISE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline Vec square_root(const Vec& x) { FUSELORA_LANEWISE(sqrtf(x.v[i])); }
static inline Vec magnitude(const Vec& x) { FUSELORA_LANEWISE(float_of(bits_of(x.v[i]) & 0x7fffffff)); }
static inline Vec select(const Vec& x, const Vec& limit, const Vec& a, const Vec& b) {
  FUSELORA_LANEWISE(x.v[i] < limit.v[i] ? a.v[i] : b.v[i]);
}
static inline Vec with_sign(const Vec& x, const Vec& sign) {
  FUSELORA_LANEWISE(float_of(bits_of(x.v[i]) | (bits_of(sign.v[i]) & 0x80000000)));
}
static inline float power2_1(float x, float t) {
  const uint32_t n = bits_of(t) - bits_of(kRoundToInteger), half = uint32_t(int32_t(n) >> 1);
  return x * float_of((half + 127) << 23) * float_of((n - half + 127) << 23);
}
static inline Vec power2(const Vec& x, const Vec& t) { FUSELORA_LANEWISE(power2_1(x.v[i], t.v[i])); }
#undef FUSELORA_LANEWISE

#endif

// c[0] + c[1] x + ... + c[n - 1] x^(n - 1)
template <int n>
static inline Vec polynomial(const float (&c)[n], Vec x) {
  Vec sum = splat(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, x, splat(c[i]));
  return sum;
}

// e^x = 2^n e^r, r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2], e^r = 1 + r + r^2 p(r): 0.05. Exact 0 and infinity outside the
// range of fp32, subnormals rounded once. 355/512 has nine bits, so its product with n is exact.
static inline Vec exp(Vec x) {
  constexpr float p[] = {0.49999994f, 0.166665152f, 0.041668456f, 0.00836941879f, 0.00138131448f};
  x = maximum(splat(-104.f), minimum(splat(89.f), x));
  const Vec t = fma(x, splat(1.44269504f), splat(kRoundToInteger)), n = t - splat(kRoundToInteger);
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-355.f / 512), x));
  return power2(fma(r * r, polynomial(p, r), r) + splat(1.f), t);
}

// 1 / (1 + e^-x)
static inline Vec logistic(Vec x) { return splat(1.f) / (splat(1.f) + exp(splat(0.f) - x)); }

// tanh below kTanhSmall, x + x^3 p(x^2): 0.07.
constexpr float kTanhSmall = 0.625f;
static inline Vec tanh_small(Vec x) {
  constexpr float p[] = {-0.333332807f, 0.133314416f, -0.0537397154f, 0.020639088f, -0.00570498779f};
  const Vec square = x * x;
  return fma(square * x, polynomial(p, square), x);
}

// Above, 1 - 2 / (e^2|x| + 1) with the sign of x.
static inline Vec tanh(Vec x) {
  const Vec size = magnitude(x), large = splat(1.f) - splat(2.f) / (exp(size + size) + splat(1.f));
  return select(size, splat(kTanhSmall), tanh_small(x), with_sign(large, x));
}

// P, the probability that a normal variable is below x, and p, its density e^(-x^2 / 2) / sqrt(2 pi).
// For x <= 0 P = e^(-x^2 / 2) t q(t), t = 1 / (1 - 0.24 x): 0.05 down to x = -14.5, where P leaves the range of fp32; so
// the lower tail keeps its relative accuracy, which 1 + erf(x / sqrt 2) loses. For x > 0 P(x) = 1 - P(-x).
struct Normal {
  Vec below, density;
};
static inline Normal normal(Vec x) {
  constexpr float q[] = {0.0957420841f, 0.0958569795f,  0.0889367163f, 0.0877523199f,  0.0281790625f,
                         0.141413957f,  -0.144233957f, 0.205457404f,  -0.124629483f, 0.0255249217f};
  const Vec bell = exp(splat(-0.5f) * (x * x));
  const Vec t = splat(1.f) / fma(magnitude(x), splat(0.24f), splat(1.f));
  const Vec tail = bell * t * polynomial(q, t);
  return {select(x, splat(0.f), tail, splat(1.f) - tail), bell * splat(0.398942280f)};
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
