// 4-bit weights in bitsandbytes' layout: dequantise and quantise. Formulas: kernels/nf4.py. Threads share blocks, whose
// length is a multiple of 16, so sixteen elements that begin at a multiple of 16 have one scale.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

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

float block_scale(const Dequantize4bit& a, int64_t block) {
  if (!a.absmax2) return static_cast<const float*>(a.absmax)[block];
  const float scaled = a.code2[static_cast<const uint8_t*>(a.absmax)[block]] * a.absmax2[block / a.blocksize2];
  return scaled + *a.offset;
}

template <class T>
void dequantize(const Dequantize4bit& a) {
  const int threads = team(a.n, a.threads);
  const int64_t blocks = (a.n + a.blocksize - 1) / a.blocksize;
  const Table table(a.code);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const Vec scale = splat(block_scale(a, block));
    const int64_t begin = block * a.blocksize;
    const int64_t end = begin + a.blocksize < a.n ? begin + a.blocksize : a.n;
    T* out = static_cast<T*>(a.out);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(out + i, table.at(a.data + i / 2) * scale, Full{});
    if (i < end) {
      uint8_t bytes[kLanes / 2] = {};
      std::memcpy(bytes, a.data + i / 2, size_t((end - i + 1) / 2));
      store(out + i, table.at(bytes) * scale, Tail{int(end - i)});
    }
  }
}

template <class T>
void quantize(const Quantize4bit& a) {
  const int threads = team(a.n, a.threads);
  const int64_t blocks = (a.n + a.blocksize - 1) / a.blocksize;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * a.blocksize;
    const int64_t size = begin + a.blocksize < a.n ? a.blocksize : a.n - begin;
    float x[kMaxBlocksize + 1];
    each(size, [&](int64_t j, auto lanes) { store(x + j, load(static_cast<const T*>(a.w) + begin + j, lanes), lanes); });
    float largest = 0.f;
    for (int64_t j = 0; j < size; ++j) largest = std::fabs(x[j]) > largest ? std::fabs(x[j]) : largest;
    const float divisor = largest > 1e-38f ? largest : 1e-38f, reciprocal = 1.f / divisor;
    const bool whole = size == a.blocksize;  // bitsandbytes divides in a last block that is not full
    a.absmax[block] = whole ? largest : divisor;
    int32_t below[kMaxBlocksize + 1];
    for (int64_t j = 0; j < size; ++j) {
      const float scaled = whole ? x[j] * reciprocal : x[j] / divisor;
      const float clamped = scaled < -1.f ? -1.f : scaled > 1.f ? 1.f : scaled;
      int32_t count = 0;
      for (int k = 0; k < 15; ++k) count += a.bounds[k] < clamped;
      below[j] = count;
    }
    if (size % 2) {  // the nibble behind an odd end is the code of 0
      below[size] = 0;
      for (int k = 0; k < 15; ++k) below[size] += a.bounds[k] < 0.f;
    }
    for (int64_t j = 0; j < size; j += 2)
      a.data[(begin + j) / 2] = uint8_t(a.order[below[j]] << 4 | a.order[below[j + 1]]);
  }
}

}  // namespace

void dequantize_4bit(const Dequantize4bit& a) {
  if (a.dtype == FUSELORA_BF16) return dequantize<bf16>(a);
  if (a.dtype == FUSELORA_F16) return dequantize<fp16>(a);
  dequantize<float>(a);
}

void quantize_4bit(const Quantize4bit& a) {
  if (a.dtype == FUSELORA_BF16) return quantize<bf16>(a);
  if (a.dtype == FUSELORA_F16) return quantize<fp16>(a);
  quantize<float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
