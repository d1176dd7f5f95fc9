// The kernels behind the C ABI: argument blocks, and one declaration per instruction set. The sources in this folder are
// compiled once per set with FUSELORA_ISA naming the namespace, so they must not use inline functions or templates of the
// standard library: the linker could keep the AVX-512 copy of one and run it on a machine without.
#pragma once

#include <cstdint>

#include "fuselora.h"

namespace fuselora {

// Work below this many elements runs on one thread: starting a team costs about 5 us.
constexpr int64_t kParallelElements = 1 << 15;

static inline int team(int64_t elements, int32_t threads) { return elements < kParallelElements || threads < 1 ? 1 : threads; }

struct RmsNorm {
  void* y;
  void* h;
  float* rstd;
  const void* x;
  const void* residual;
  const void* weight;
  float* scale;  // scratch [cols]: weight in fp32, 1 + weight, or ones
  int64_t rows, cols;
  int32_t dtype, weight_dtype;
  float eps;
  int32_t mode, threads;
};

// The weight gradient sums in four levels: up to kDwRows rows, those sums within a row block, up to kDwRows blocks, those
// sums. Rounding grows with the square root of each level's length rather than of the row count. The blocks are a function
// of the shape alone, so dw doesn't depend on the thread count.
constexpr int64_t kDwBlocks = 128, kDwRows = 8;

static inline int64_t dw_block_rows(int64_t rows) {
  const int64_t even = (rows + kDwBlocks - 1) / kDwBlocks;
  return even < kDwRows ? kDwRows : even;
}

static inline int64_t dw_blocks(int64_t rows) { return (rows + dw_block_rows(rows) - 1) / dw_block_rows(rows); }

struct RmsNormBwd {
  void* dx;
  void* dw;
  const void* dy;
  const void* dh;
  const void* h;
  const void* weight;
  const float* rstd;
  float* scale;     // scratch [cols]
  float* partials;  // scratch [dw_blocks(rows), 2, cols] when dw is wanted: a block's sum, and its latest rows'
  int64_t rows, cols;
  int32_t dy_dtype, dtype, weight_dtype, mode, threads;
};

struct Dropout {
  void* y;
  const void* x;
  int64_t n;
  int32_t dtype;
  uint64_t seed;
  uint32_t threshold;
  float scale;
  int32_t threads;
};

struct Glu {
  void* h;
  const void* gate;
  const void* up;
  int64_t rows, cols, gate_stride, up_stride;
  int32_t dtype, act, threads;
};

struct GluBwd {
  void* dgate;
  void* dup;
  void* h;
  const void* dh;
  const void* gate;
  const void* up;
  int64_t rows, cols, d_stride, dh_stride, gate_stride, up_stride;
  int32_t dtype, act, threads;
};

struct Rope {
  void* y_q;
  void* y_k;
  const void* q;
  const void* k;
  const void* cos;
  const void* sin;
  int64_t batch, length, heads_q, heads_k, width, rotary;
  const int64_t* strides;
  int64_t table_batch_stride;
  int32_t dtype, table_dtype;
  bool interleaved, adjoint;
  int32_t threads;
};

struct CrossEntropy {
  float* loss;
  float* lse;
  float* entropy;
  void* dx;
  const void* x;
  const int64_t* labels;
  const float* upstream;
  const float* dentropy;
  int64_t rows, cols, dx_stride, x_stride;
  int32_t dtype;
  int64_t ignore_index;
  float softcap, label_smoothing, logit_scale, z_loss;
  int32_t threads;
};

constexpr int64_t kMaxBlocksize = 4096;

struct Weight4bit {
  const uint8_t* data;
  const void* absmax;  // fp32, or bytes with absmax2
  const float* code;
  const float* absmax2;
  const float* code2;
  const float* offset;
  int64_t blocksize, blocksize2;
};

struct Dequantize4bit {
  void* out;
  Weight4bit weight;
  int64_t n;
  int32_t dtype, threads;
};

struct Quantize4bit {
  uint8_t* data;
  float* absmax;
  const void* w;
  const float* bounds;   // [15] middles between neighbouring codes, ascending
  const uint8_t* order;  // [16] nibbles of the codes in ascending order
  int64_t n, blocksize;
  int32_t dtype, threads;
};

using GemmTerm = fuselora_gemm_term;

// Rows whose sums rest in fp32 between segments of the depth; a thread's memory: those of a block and a panel's bias,
// and a panel.
constexpr int64_t kGemmRows = 1024, kGemmSumsBytes = (kGemmRows + 32) * 64 * 4, kGemmPanelBytes = (1280 + 64) * 64 * 2;
constexpr int64_t kGemmWorkspace = kGemmSumsBytes + kGemmPanelBytes;

struct Gemm {
  void* out;
  int64_t out_row, out_col, m, n;
  const GemmTerm* terms;
  int count;
  const void* bias;
  float alpha;
  int32_t out_dtype, dtype, threads;
  char* workspace;  // [threads, kGemmWorkspace] bytes
};

#define FUSELORA_DECLARE(isa)              \
  namespace isa {                          \
  void rms_norm(const RmsNorm& a);         \
  void rms_norm_bwd(const RmsNormBwd& a);  \
  void dropout(const Dropout& a);          \
  void glu(const Glu& a);                  \
  void glu_bwd(const GluBwd& a);           \
  void rope(const Rope& a);                \
  void cross_entropy(const CrossEntropy& a); \
  void dequantize_4bit(const Dequantize4bit& a); \
  void quantize_4bit(const Quantize4bit& a); \
  void gemm(const Gemm& a);                \
  void philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]); \
  }

FUSELORA_DECLARE(scalar)
#if defined(__x86_64__)
FUSELORA_DECLARE(avx2)
FUSELORA_DECLARE(avx512)
FUSELORA_DECLARE(avx512_bf16)
#endif
#undef FUSELORA_DECLARE

}  // namespace fuselora
