// Philox-4x32 with ten rounds (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), kWide counters at a
// time. A word lies in the low half of a 64-bit lane and the high half may hold anything: the 32 x 32 -> 64 bit product
// of x86 reads low halves only, so a round of two words is one product, one shift and two exclusive ors, unmasked.
#pragma once

#include "cpu/vec.h"

namespace fuselora {
namespace FUSELORA_ISA {

#if defined(__AVX512F__)

constexpr int kWide = 8;
struct Wide {
  __m512i v;
};
static inline Wide wide(uint64_t x) { return {_mm512_set1_epi64(int64_t(x))}; }
// Lane order 0 4 1 5 2 6 3 7: store_words then writes the blocks of counters first .. first + 7 in order.
static inline Wide count_from(uint64_t first) {
  return {_mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0))};
}
static inline Wide product(Wide a, uint32_t b) { return {_mm512_mul_epu32(a.v, _mm512_set1_epi64(b))}; }
static inline Wide high(Wide a) { return {_mm512_srli_epi64(a.v, 32)}; }
static inline Wide exclusive_or(Wide a, Wide b, uint32_t c) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, _mm512_set1_epi64(c), 0x96)};
}
static inline __m512i pair(Wide low, Wide upper) {
  return _mm512_mask_mov_epi32(low.v, 0xAAAA, _mm512_slli_epi64(upper.v, 32));
}
static inline void store_words(uint32_t out[4 * kWide], const Wide w[4]) {
  const __m512i first = pair(w[0], w[1]), second = pair(w[2], w[3]);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(first, second));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(first, second));
}

#elif defined(__AVX2__)

constexpr int kWide = 4;
struct Wide {
  __m256i v;
};
static inline Wide wide(uint64_t x) { return {_mm256_set1_epi64x(int64_t(x))}; }
static inline Wide count_from(uint64_t first) {
  return {_mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), _mm256_set_epi64x(3, 1, 2, 0))};
}
static inline Wide product(Wide a, uint32_t b) { return {_mm256_mul_epu32(a.v, _mm256_set1_epi64x(b))}; }
static inline Wide high(Wide a) { return {_mm256_srli_epi64(a.v, 32)}; }
static inline Wide exclusive_or(Wide a, Wide b, uint32_t c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), _mm256_set1_epi64x(c))};
}
static inline __m256i pair(Wide low, Wide upper) {
  return _mm256_blend_epi32(low.v, _mm256_slli_epi64(upper.v, 32), 0xAA);
}
static inline void store_words(uint32_t out[4 * kWide], const Wide w[4]) {
  const __m256i first = pair(w[0], w[1]), second = pair(w[2], w[3]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(first, second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(first, second));
}

#else

constexpr int kWide = 1;
struct Wide {
  uint64_t v;
};
static inline Wide wide(uint64_t x) { return {x}; }
static inline Wide count_from(uint64_t first) { return {first}; }
static inline Wide product(Wide a, uint32_t b) { return {uint64_t(uint32_t(a.v)) * b}; }
static inline Wide high(Wide a) { return {a.v >> 32}; }
static inline Wide exclusive_or(Wide a, Wide b, uint32_t c) { return {a.v ^ b.v ^ c}; }
static inline void store_words(uint32_t out[4 * kWide], const Wide w[4]) {
  for (int lane = 0; lane < 4; ++lane) out[lane] = uint32_t(w[lane].v);
}

#endif

// Two multipliers, and two Weyl increments of the key: the golden ratio and sqrt(3) - 1 as 32-bit fractions.
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;

static inline void philox_rounds(Wide w[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kRounds; ++round) {
    const Wide product0 = product(w[0], kMultiplier0), product1 = product(w[2], kMultiplier1);
    w[0] = exclusive_or(high(product1), w[1], key0);
    w[1] = product1;
    w[2] = exclusive_or(high(product0), w[3], key1);
    w[3] = product0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

// The words of counters first .. first + kWide - 1, four per counter, in order.
static inline void philox_words(uint32_t out[4 * kWide], uint64_t first, uint64_t seed) {
  const Wide counter = count_from(first);
  Wide w[4] = {counter, high(counter), wide(0), wide(0)};
  philox_rounds(w, uint32_t(seed), uint32_t(seed >> 32));
  store_words(out, w);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
