// The CUDA kernels of 4-bit weights, emulated on the host: dequantised values bit for bit those of the CPU library, and
// products exact where fp32 is. Weights of many lengths, blocks of every size, unaligned pointers, both kinds of scales.
#include <algorithm>

#include "emulated_device.h"
// The kernels use its functions.
#include "cuda/nf4.cuh"
#include "cuda/nf4_matmul.cuh"
#include "fuselora.h"

using namespace fuselora;

static int failures = 0;
static uint32_t state = 1;

static uint32_t random_bits() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
static float random_float() { return float(random_bits()) / (1 << 23) - 1.f; }

template <class T>
constexpr int32_t kDtype = std::is_same<T, bf16>::value ? FUSELORA_BF16 : std::is_same<T, fp16>::value ? FUSELORA_F16
                                                                                                       : FUSELORA_F32;
static int32_t log2_of(int64_t x) { return (x & (x - 1)) == 0 ? __builtin_ctzll(uint64_t(x)) : -1; }

// `exact`: values whose products with small integers fp32 adds without rounding.
struct Quantized {
  int64_t blocksize, blocksize2;
  std::vector<uint8_t> data, bytes;
  std::vector<float> absmax, absmax2, code = std::vector<float>(16), code2 = std::vector<float>(256);
  float offset;
  int64_t skip;  // bytes before the data

  Quantized(int64_t n, int64_t blocksize, int64_t blocksize2, int64_t skip, bool exact)
      : blocksize(blocksize), blocksize2(blocksize2), offset(exact ? 0.25f : random_float()), skip(skip) {
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    data.resize(size_t(skip + (n + 1) / 2));
    for (uint8_t& byte : data) byte = uint8_t(random_bits());
    bytes.resize(size_t(blocks));
    for (uint8_t& byte : bytes) byte = uint8_t(random_bits());
    absmax.resize(size_t(blocks));
    for (float& x : absmax) x = exact ? 1.f / float(1 << random_bits() % 4) : random_float();
    if (blocksize2) absmax2.resize(size_t((blocks + blocksize2 - 1) / blocksize2));
    for (float& x : absmax2) x = exact ? 1.f / float(1 << random_bits() % 2) : random_float();
    for (int i = 0; i < 256; ++i) code2[size_t(i)] = exact ? float(1 << i % 3) / 4.f : random_float();
    for (int i = 0; i < 16; ++i) code[size_t(i)] = exact ? float(i - 8) / 8.f : random_float();
  }
  const void* scales() const { return blocksize2 ? static_cast<const void*>(bytes.data()) : absmax.data(); }
  Weight4bit weight() const {
    const bool nested = blocksize2 != 0;
    return {data.data() + skip,         scales(),
            code.data(),                nested ? absmax2.data() : nullptr,
            nested ? code2.data() : nullptr, nested ? &offset : nullptr,
            log2_of(blocksize),         nested ? blocksize2 : 1,
            nested ? log2_of(blocksize2) : 0};
  }
  void dequantize(void* out, int64_t n, int32_t dtype) const {
    const Weight4bit w = weight();
    if (fuselora_dequantize_4bit(out, w.data, w.absmax, w.code, w.absmax2, w.code2, w.offset, n, blocksize, w.blocksize2,
                                 dtype, 1) != FUSELORA_OK)
      std::abort();
  }
};

template <class T, int kSteps>
static void check_dequantize(int64_t n, int64_t blocksize, int64_t blocksize2, int64_t skip, int64_t out_skip) {
  const Quantized q(n, blocksize, blocksize2, skip, false);
  std::vector<T> expected(size_t(n) + 1);
  q.dequantize(expected.data(), n, kDtype<T>);
  // 16-byte units, so that out_skip alone decides the alignment; a guard behind the end.
  std::vector<uint4> memory(size_t((n + out_skip) * int64_t(sizeof(T)) / 16 + 2));
  std::memset(memory.data(), 0xa5, memory.size() * sizeof(uint4));
  T* out = reinterpret_cast<T*>(memory.data()) + out_skip;
  Dequantize a = {out, q.weight(), n, 0, 0};
  const int64_t blocks = plan<T>(a, kSteps, 3);
  emulate(dequantize_4bit<T, kSteps>, blocks, a);
  T guard;
  std::memset(&guard, 0xa5, sizeof guard);
  const bool aligned = out_skip * int64_t(sizeof(T)) % 16 == 0 && skip % 4 == 0 && log2_of(q.weight().blocksize2) >= 0;
  const bool right = std::memcmp(out, expected.data(), size_t(n) * sizeof(T)) == 0 &&
                     std::memcmp(out + n, &guard, sizeof guard) == 0 &&
                     a.tiles == (aligned ? n / tile_size<T>(kSteps) : 0);
  if (right) return;
  ++failures;
  std::printf("dequantize: dtype %d, n %lld, blocks %lld %lld, skip %lld %lld: wrong\n", kDtype<T>,
              static_cast<long long>(n), static_cast<long long>(blocksize), static_cast<long long>(blocksize2),
              static_cast<long long>(skip), static_cast<long long>(out_skip));
}

template <class T>
static void check_dequantize() {
  for (int64_t blocksize = 32; blocksize <= 4096; blocksize *= 2)
    for (int64_t blocksize2 : {0, 4, 256}) {
      const int64_t n = 9 * 2048 + 33;
      if (sizeof(T) == 2 && blocksize == 32)
        check_dequantize<T, 4>(n, blocksize, blocksize2, 0, 0);
      else
        check_dequantize<T, 8>(n, blocksize, blocksize2, 0, 0);
    }
  for (int64_t n : {1, 2, 63, 64, 65, 2047, 2048, 2049, 8 * 2048, 8 * 2048 - 1})
    check_dequantize<T, 8>(n, 64, 256, 0, 0);
  check_dequantize<T, 8>(60 * 2048, 64, 256, 0, 0);  // every warp has several tiles
  check_dequantize<T, 8>(5000, 64, 256, 1, 0);
  check_dequantize<T, 8>(5000, 64, 256, 4, 0);
  check_dequantize<T, 8>(5000, 64, 256, 0, 1);
  check_dequantize<T, 8>(50000, 64, 100, 0, 0);
}

template <class T>
static void check_matmul(int64_t m, int64_t n, int64_t k, int64_t blocksize, int64_t blocksize2, bool has_bias) {
  const Quantized q(n * k, blocksize, blocksize2, 0, true);
  std::vector<float> w(size_t(n * k)), x(size_t(m * k)), bias(static_cast<size_t>(n));
  q.dequantize(w.data(), n * k, FUSELORA_F32);
  std::vector<uint4> x_memory(size_t(m * k / 8));
  T* x_narrow = reinterpret_cast<T*>(x_memory.data());
  std::vector<T> bias_narrow(static_cast<size_t>(n)), y(size_t(m * n));
  for (size_t i = 0; i < x.size(); ++i) x_narrow[i] = narrow<T>(x[i] = float(random_bits() % 9) - 4.f);
  for (size_t i = 0; i < bias.size(); ++i) bias_narrow[i] = narrow<T>(bias[i] = float(random_bits() % 65) / 8.f - 4.f);
  const Matmul4bit a = {y.data(), x_narrow, has_bias ? bias_narrow.data() : nullptr, q.weight(), n, int32_t(k), int32_t(m)};
  emulate(matmul_4bit<T>, (n + kRows - 1) / kRows, a);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = has_bias ? bias[size_t(j)] : 0.;
      for (int64_t l = 0; l < k; ++l) sum += double(x[size_t(i * k + l)]) * w[size_t(j * k + l)];
      const T expected = narrow<T>(float(sum));
      if (expected.bits == y[size_t(i * n + j)].bits) continue;
      ++failures;
      std::printf("matmul: dtype %d, m %lld, n %lld, k %lld: y[%lld, %lld] = %g, not %g\n", kDtype<T>,
                  static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                  static_cast<long long>(i), static_cast<long long>(j), widen(y[size_t(i * n + j)]), sum);
      return;
    }
}

template <class T>
static void check_matmul() {
  for (int64_t m = 1; m <= 8; ++m) check_matmul<T>(m, 24, 192, 64, 256, m % 2);
  for (int64_t k : {64, 256, 320, 2048, 2240}) check_matmul<T>(3, 17, k, 64, k % 3 ? 4 : 0, false);
  for (int64_t blocksize = 64; blocksize <= 4096; blocksize *= 2) check_matmul<T>(2, 33, 448, blocksize, 0, true);
  check_matmul<T>(1, 1, 64, 64, 256, true);
}

// p such that p[i] is where[0].
template <class T>
static T* before(T* where, int64_t i) {
  return reinterpret_cast<T*>(reinterpret_cast<intptr_t>(where) - i * intptr_t(sizeof(T)));
}

static Weight4bit far_weight(const Quantized& q, int64_t begin) {
  Weight4bit w = q.weight();
  w.data = before(w.data, begin / 2);
  w.absmax = before(static_cast<const uint8_t*>(w.absmax), begin / q.blocksize);
  w.absmax2 = before(w.absmax2, begin / q.blocksize / q.blocksize2);
  return w;
}

// The last thread block of a weight of more than 2^31 elements, of which only what that block touches is there.
static void check_far() {
  const int64_t n = kWarps * tile_size<bf16>(8), block = 200000, begin = block * n;  // n: one outer block, 64 * 256
  const Quantized q(n, 64, 256, 0, false);
  std::vector<bf16> expected(static_cast<size_t>(n));
  std::vector<uint4> out(static_cast<size_t>(n / 8));
  q.dequantize(expected.data(), n, FUSELORA_BF16);
  Dequantize a = {before(reinterpret_cast<bf16*>(out.data()), begin), far_weight(q, begin), begin + n, 0, 0};
  if (plan<bf16>(a, 8, block + 1) != block + 1) ++failures, std::puts("far: wrong grid");
  emulate(dequantize_4bit<bf16, 8>, block + 1, a, block);
  if (std::memcmp(out.data(), expected.data(), size_t(n) * sizeof(bf16)) != 0) ++failures, std::puts("far: wrong");

  const int64_t k = 1024, row = block * kRows;  // kRows * k = n
  std::vector<uint4> x(static_cast<size_t>(k / 8));
  std::fill_n(reinterpret_cast<bf16*>(x.data()), k, narrow<bf16>(1.f));
  const Quantized e(n, 64, 256, 0, true);
  std::vector<float> w(static_cast<size_t>(n));
  e.dequantize(w.data(), n, FUSELORA_F32);
  std::vector<bf16> y(kRows);
  const Matmul4bit b = {before(y.data(), row), x.data(), nullptr, far_weight(e, begin), row + kRows, int32_t(k), 1};
  emulate(matmul_4bit<bf16>, block + 1, b, block);
  for (int64_t i = 0; i < kRows; ++i) {
    float sum = 0;
    for (int64_t l = 0; l < k; ++l) sum += w[size_t(i * k + l)];
    if (narrow<bf16>(sum).bits != y[size_t(i)].bits) ++failures, std::puts("far product: wrong");
  }
}

int main() {
  check_far();
  check_dequantize<bf16>();
  check_dequantize<fp16>();
  check_dequantize<float>();
  check_matmul<bf16>();
  check_matmul<fp16>();
  std::puts(failures ? "FAILED" : "passed");
  return failures != 0;
}
