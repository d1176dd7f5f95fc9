// y = x W^T + bias for up to 8 rows of x and a 4-bit weight W [N, K], for generation. Formulas: kernels/matmul_4bit.py.
//
// The tensor cores multiply 16 rows of codes, not yet scaled, by x^T: W is the left operand, so that 8 rows of x cost
// what one does. Within a block of the weight all products share a scale: y += scale * (codes x^T). A block of threads
// computes 16 rows of W; its 8 warps take runs of 256 columns in turn and add their sums in a fixed order. Codes are
// read once; a row of x is read once per 16 rows of W, by one warp, from L2: shared memory would have no second reader.
//
// Numerics: fp32 sums. x enters exactly (bf16 and fp16 are tf32 numbers), the 16 codes rounded to 11 bits (2^-12), which
// is nearer than weights rounded to bf16; scales are fp32; one rounding at the end.
//
// Which of a matrix product's k an element is, is free as long as both operands agree: the four lanes of a row take 16
// neighbouring columns each of a chunk of 64, so that every chunk lies in one block of the weight.
//
// Instructions per weight, counted before compiling: shift 7/8, shuffle 1, a quarter of a matrix instruction, x to fp32
// 1/2; per lane and 128 weights: loads 8 + 8, scales 2 * 20 + 8 shuffles + 16, sums 16, loop 20; together 3.5.
// Compiled for sm_90: 3.81, with guards and zeros that the count left out.
#pragma once
#include "cuda/nf4.cuh"

namespace fuselora {

struct Matmul4bit {
  void* y;              // [m, n]
  const void* x;        // [m, k]
  const void* bias;     // [n], or NULL
  Weight4bit w;         // [n, k]
  int64_t n;
  int32_t k;            // a multiple of 64
  int32_t m;            // 1 to 8
};

constexpr int kRows = 16, kMaxM = 8, kChunk = 64, kRun = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) matmul_4bit(const Matmul4bit a) {
  __shared__ float sums[kWarps][kMaxM][kRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const float table = round_tf32(a.w.code[lane % 16]), offset = load_offset(a.w);
  const int64_t row = int64_t(blockIdx.x) * kRows;
  // Rows behind the end read the last one, and are not stored.
  const int64_t rows[2] = {row + g < a.n ? row + g : a.n - 1, row + g + 8 < a.n ? row + g + 8 : a.n - 1};
  const uint2* codes_at[2];
  int64_t starts[2];  // of the rows, as elements of W
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    starts[i] = rows[i] * a.k;
    codes_at[i] = reinterpret_cast<const uint2*>(a.w.data + ((starts[i] + warp * kRun) >> 1)) + t;
  }
  const uint4* x_at = reinterpret_cast<const uint4*>(static_cast<const T*>(a.x) + int64_t(g) * a.k + warp * kRun) + 2 * t;
  float y[4] = {};
  for (int run = warp * kRun; run < a.k; run += kWarps * kRun) {
    uint2 codes[kRun / kChunk][2];
    uint4 xs[kRun / kChunk][2];
    float scales[2];  // lane t has that of chunk t
#pragma unroll
    for (int c = 0; c < kRun / kChunk; ++c) {
      const bool inside = run + c * kChunk < a.k;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        codes[c][i] = inside ? load_once(codes_at[i] + 4 * c) : uint2{};
        xs[c][i] = inside && g < a.m ? x_at[8 * c + i] : uint4{};
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t block = (starts[i] + run + t * kChunk) >> a.w.log_blocksize;
      scales[i] = run + t * kChunk < a.k ? block_scale(a.w, block, block >> a.w.log_blocksize2, offset) : 0.f;
    }
#pragma unroll
    for (int c = 0; c < kRun / kChunk; ++c) {
      float acc[4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t first = i ? codes[c][0].y : codes[c][0].x, second = i ? codes[c][1].y : codes[c][1].x;
        const uint32_t pairs[4] = {xs[c][i].x, xs[c][i].y, xs[c][i].z, xs[c][i].w};
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          const float2 pair = widen_pair<T>(pairs[j / 2]);
          const float left[4] = {shuffle<16>(table, int(first >> nibble_shift(j))),
                                 shuffle<16>(table, int(second >> nibble_shift(j))),
                                 shuffle<16>(table, int(first >> nibble_shift(j + 1))),
                                 shuffle<16>(table, int(second >> nibble_shift(j + 1)))};
          mma(acc, left, {pair.x, pair.y});
        }
      }
      const float top = shuffle<4>(scales[0], c), bottom = shuffle<4>(scales[1], c);
      y[0] += top * acc[0];
      y[1] += top * acc[1];
      y[2] += bottom * acc[2];
      y[3] += bottom * acc[3];
    }
    codes_at[0] += kWarps * kRun / 16;
    codes_at[1] += kWarps * kRun / 16;
    x_at += kWarps * kRun / 8;
  }
  sums[warp][2 * t][g] = y[0];
  sums[warp][2 * t + 1][g] = y[1];
  sums[warp][2 * t][g + 8] = y[2];
  sums[warp][2 * t + 1][g + 8] = y[3];
  __syncthreads();
  const int m = threadIdx.x / kRows, n = threadIdx.x % kRows;
  if (m >= a.m || row + n >= a.n) return;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += sums[i][m][n];
  if (a.bias != nullptr) sum += widen(static_cast<const T*>(a.bias)[row + n]);
  static_cast<T*>(a.y)[m * a.n + row + n] = narrow<T>(sum);
}

}  // namespace fuselora
