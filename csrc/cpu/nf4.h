// Codes and scales of 4-bit weights; formulas in kernels/nf4.py.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fuselora {
namespace FUSELORA_ISA {

// at(bytes): the codes of sixteen elements, eight bytes.
#if defined(__AVX512F__)

struct Table {
  __m512 values;
  explicit Table(const float* code) : values(_mm512_loadu_ps(code)) {}
  // Eight bytes, each copied into a 64-bit lane: its high nibble goes to the lower half, its low nibble to the upper.
  Vec at(const uint8_t* bytes) const {
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i both = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
    return {_mm512_permutexvar_ps(both, values)};  // reads the lowest four bits of each index
  }
};

#elif defined(__AVX2__)

struct Table {
  __m256 first, second;
  explicit Table(const float* code) : first(_mm256_loadu_ps(code)), second(_mm256_loadu_ps(code + 8)) {}
  __m256 eight(const uint8_t* bytes) const {
    int32_t four;
    std::memcpy(&four, bytes, 4);
    const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i both = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
    const __m256 low = _mm256_permutevar8x32_ps(first, both), high = _mm256_permutevar8x32_ps(second, both);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(both, 28)));  // bit 3 as the sign
  }
  Vec at(const uint8_t* bytes) const { return {eight(bytes), eight(bytes + 4)}; }
};

#else

struct Table {
  const float* code;
  explicit Table(const float* values) : code(values) {}
  Vec at(const uint8_t* bytes) const {
    Vec x;
    for (int i = 0; i < kLanes; ++i) x.v[i] = code[i % 2 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4];
    return x;
  }
};

#endif

// The scales of a weight's blocks. Divisions are shifts, except by a blocksize2 that is no power of two: one per 32
// weights would take longer than decoding them.
struct Scales {
  Weight4bit w;
  int shift, shift2;
  explicit Scales(const Weight4bit& weight)
      : w(weight),
        shift(__builtin_ctzll(uint64_t(w.blocksize))),
        shift2(w.blocksize2 & (w.blocksize2 - 1) ? -1 : __builtin_ctzll(uint64_t(w.blocksize2))) {}
  float of_block(int64_t block) const {
    if (!w.absmax2) return static_cast<const float*>(w.absmax)[block];
    const float scale2 = w.absmax2[shift2 < 0 ? block / w.blocksize2 : block >> shift2];
    const float scaled = w.code2[static_cast<const uint8_t*>(w.absmax)[block]] * scale2;
    return scaled + *w.offset;
  }
  float of_element(int64_t i) const { return of_block(i >> shift); }
};

}  // namespace FUSELORA_ISA
}  // namespace fuselora
