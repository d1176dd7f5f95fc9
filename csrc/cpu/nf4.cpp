// 4-bit weights in bitsandbytes' layout: dequantise and quantise. Formulas: kernels/nf4.py. Threads share blocks, whose
// length is a multiple of 16, so sixteen elements that begin at a multiple of 16 have one scale.
#include "cpu/nf4.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

float larger(float a, float b) { return a > b ? a : b; }

template <class T>
void dequantize(const Dequantize4bit& a) {
  const int threads = team(a.n, a.threads);
  const Weight4bit& w = a.weight;
  const int64_t blocks = (a.n + w.blocksize - 1) / w.blocksize;
  const Table table(w.code);
  const Scales scales(w);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const Vec scale = splat(scales.of_block(block));
    const int64_t begin = block * w.blocksize;
    const int64_t end = begin + w.blocksize < a.n ? begin + w.blocksize : a.n;
    T* out = static_cast<T*>(a.out);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(out + i, table.at(w.data + i / 2) * scale, Full{});
    if (i < end) {
      uint8_t bytes[kLanes / 2] = {};
      std::memcpy(bytes, w.data + i / 2, size_t((end - i + 1) / 2));
      store(out + i, table.at(bytes) * scale, Tail{int(end - i)});
    }
  }
}

// The bits of magnitudes ascend with them, and those of NaN are above all.
float largest_magnitude(const float* x, int64_t size) {
  int32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof magnitude);
  return magnitude;
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
    const float largest = largest_magnitude(x, size);
    const float divisor = largest < 1e-38f ? 1e-38f : largest, reciprocal = 1.f / divisor;
    const bool whole = size == a.blocksize;  // bitsandbytes divides in a last block that is not full
    a.absmax[block] = whole ? largest : divisor;
    int32_t below[kMaxBlocksize + 1];
    for (int64_t j = 0; j < size; ++j) {
      const float scaled = whole ? x[j] * reciprocal : x[j] / divisor;
      const float clamped = scaled < -1.f ? -1.f : scaled > 1.f ? 1.f : scaled;
      int32_t count = 0;
      for (int k = 0; k < 15; ++k) count += !(a.bounds[k] >= clamped);  // NaN is above all
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

// A normalised scale is one of kSteps steps of [-1, 1], so a table holds the code of each; both ascend. Zeros divided by
// their largest magnitude, 0 / 0, are the first step.
void quantize_absmax(const QuantizeAbsmax& a) {
  constexpr int32_t kSteps = 65536;
  constexpr int64_t kPiece = 256;
  const int threads = team(a.n, a.threads);
  const int64_t blocks = (a.n + a.blocksize2 - 1) / a.blocksize2;
  uint8_t nearest[kSteps];
  for (int32_t step = 0, code = 0; step < kSteps; ++step) {
    const float value = -1.f + 2.f * float(step) / float(kSteps - 1);
    while (code < 255 && a.bounds[code] < value) ++code;
    nearest[step] = uint8_t(code);
  }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * a.blocksize2, end = begin + a.blocksize2 < a.n ? begin + a.blocksize2 : a.n;
    const float offset = *a.offset;
    float of_lane[kLanes] = {};  // a single maximum would be a chain of latencies
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane)
        of_lane[lane] = larger(of_lane[lane], std::fabs(a.absmax[i + lane] - offset));
    float largest = 0.f;
    for (; i < end; ++i) largest = larger(largest, std::fabs(a.absmax[i] - offset));
    for (const float of : of_lane) largest = larger(of, largest);
    a.absmax2[block] = largest;
    const float reciprocal = 1.f / largest;
    for (int64_t at = begin; at < end; at += kPiece) {
      const int64_t size = at + kPiece < end ? kPiece : end - at;
      int32_t steps[kPiece];
      for (int64_t i = 0; i < size; ++i) {
        const float scaled = (a.absmax[at + i] - offset) * reciprocal;
        const float low = scaled > -1.f ? scaled : -1.f;  // NaN too
        steps[i] = int32_t(((low < 1.f ? low : 1.f) + 1.f) * 0.5f * float(kSteps - 1) + 0.5f);
      }
      for (int64_t i = 0; i < size; ++i) a.codes[at + i] = nearest[steps[i]];
    }
  }
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
