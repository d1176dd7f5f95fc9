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

static inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

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

struct LayerNorm {
  void* y;
  float* mean;
  float* rstd;
  const void* x;
  const void* weight;
  const void* bias;
  float* scale;  // scratch [cols]: weight in fp32, or ones
  float* shift;  // scratch [cols]: bias in fp32, or zeros
  int64_t rows, cols;
  int32_t dtype, weight_dtype, bias_dtype;
  float eps;
  int32_t threads;
};

struct LayerNormBwd {
  void* dx;
  float* dw;
  float* db;
  const void* dy;
  const void* x;
  const void* weight;
  const float* mean;
  const float* rstd;
  float* scale;        // scratch [cols]
  float* dw_partials;  // scratch [dw_blocks(rows), 2, cols] each when wanted, as RmsNormBwd's
  float* db_partials;
  int64_t rows, cols;
  int32_t dtype, weight_dtype, threads;
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

// Elements per partial sum of the gradients' norm and per task of the update.
constexpr int64_t kAdamWBlock = 8192;

static inline int64_t adamw_blocks(int64_t size) { return (size + kAdamWBlock - 1) / kAdamWBlock; }

struct AdamW {
  float* norm;
  void* const* params;
  const void* const* grads;
  void* const* low;        // or null
  const int64_t* sizes;    // [count] elements
  const int64_t* offsets;  // [count] of exp_avg and exp_avg_sq
  const int64_t* blocks;   // [count + 1] each tensor's first block; the last entry is their number
  float* partials;         // scratch [blocks]
  int64_t count;
  void* exp_avg;
  void* exp_avg_sq;
  float* steps;
  const double* lrs;
  const double* decays;
  double beta1, beta2, eps, max_norm;
  float inv_scale;
  int32_t dtype, low_dtype, threads;
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

// Tiles of attention, the same on every instruction set.
constexpr int64_t kQueries = 64, kKeys = 96;

struct Attention {
  const void* q;
  const void* k;
  const void* v;
  const int32_t* ranges;  // [batch, length, 2], or null
  int64_t batch, heads, kv_heads, length, keys, width;
  const int64_t* strides;  // of batch, head and position: q's, k's, v's
  int32_t dtype;
  float scale;
  bool causal;
  int64_t window;  // 0: none
  float softcap;   // 0: none
  int32_t threads;
  float* scratch;  // attention_scratch or attention_bwd_scratch floats, aligned to 64 bytes
};

struct AttentionFwd {
  Attention in;
  void* out;   // [batch, length, heads, width]
  float* lse;  // [batch, heads, length]
};

struct AttentionBwd {
  Attention in;
  void* dq;          // [batch, length, heads, width]
  void* dk;          // [batch, keys, kv_heads, width]
  void* dv;
  const void* dout;  // as out
  const void* out;
  const float* lse;
};

// Floats of scratch memory: what all threads share, and what each has. bf16 operands need half of some of it.
static inline int64_t padded_width(const Attention& a) { return (a.width + 15) / 16 * 16; }
static inline int64_t key_tiles(const Attention& a) { return (a.keys + kKeys - 1) / kKeys; }
static inline int64_t query_tiles(const Attention& a) { return (a.length + kQueries - 1) / kQueries; }
static inline int64_t kv_panel(const Attention& a) { return key_tiles(a) * kKeys * padded_width(a); }

static inline int64_t attention_shared(const Attention& a) { return 2 * a.batch * a.kv_heads * kv_panel(a); }
static inline int64_t attention_each(const Attention& a) {
  return 2 * padded_width(a) * kQueries + 2 * kKeys * kQueries + 8 * kQueries;
}
static inline int64_t attention_scratch(const Attention& a) {
  return attention_shared(a) + larger_of(a.threads, 1) * attention_each(a);
}

// The backward's tasks are (batch, kv head, chunk), where a chunk takes every n-th key tile and has its own share of dQ.
// n follows from the shape, so that results don't depend on the threads: enough tasks for many, no chunk below three tiles.
static inline int64_t key_chunks(const Attention& a) {
  const int64_t wanted = (32 + a.batch * a.kv_heads - 1) / larger_of(a.batch * a.kv_heads, 1);
  return larger_of(1, wanted < key_tiles(a) / 3 ? wanted : key_tiles(a) / 3);
}
// Shares are summed after every so many query tiles, so that they stay in a cache however long a row is.
constexpr int64_t kShareFloats = int64_t(1) << 21;
static inline int64_t share_tiles(const Attention& a) {
  const int64_t tile = a.batch * a.kv_heads * key_chunks(a) * kQueries * padded_width(a);
  const int64_t some = larger_of(4, kShareFloats / larger_of(tile, 1));
  return key_chunks(a) == 1 || query_tiles(a) < some ? query_tiles(a) : some;
}
static inline int64_t dq_shares(const Attention& a) {
  const int64_t chunks = key_chunks(a);
  return chunks == 1 ? 0 : a.batch * a.kv_heads * chunks * share_tiles(a) * kQueries * padded_width(a);
}
// What a query tile is packed to: q and dout twice each, lse and delta.
static inline int64_t packed_queries(const Attention& a) { return 4 * padded_width(a) * kQueries + 2 * kQueries; }
static inline int64_t attention_bwd_shared(const Attention& a) {
  const int64_t packs = key_chunks(a) == 1 ? 0 : a.batch * a.kv_heads * share_tiles(a) * packed_queries(a);
  return 5 * a.batch * a.kv_heads * kv_panel(a) + dq_shares(a) + packs;
}
static inline int64_t attention_bwd_each(const Attention& a) {
  return packed_queries(a) + padded_width(a) * kQueries + 5 * kKeys * kQueries;
}
static inline int64_t attention_bwd_scratch(const Attention& a) {
  return attention_bwd_shared(a) + larger_of(a.threads, 1) * attention_bwd_each(a);
}

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

struct QuantizeAbsmax {
  uint8_t* codes;
  float* absmax2;
  const float* absmax;
  const float* offset;
  const float* bounds;  // [255] middles between neighbouring codes, ascending
  int64_t n, blocksize2;
  int32_t threads;
};

using GemmTerm = fuselora_gemm_term;

// Rows whose sums rest in fp32 between segments of the depth, and panels whose sums do at the same time. A thread's
// memory: the bias of a panel, the panel, and the sums; what a product doesn't need is never touched.
constexpr int64_t kGemmRows = 1024, kGemmGroup = 4, kGemmBiasBytes = 64 * 4, kGemmPanelBytes = (1280 + 64) * 64 * 2;
constexpr int64_t kGemmSumsBytes = kGemmGroup * (kGemmRows + 24) * 64 * 4;
constexpr int64_t kGemmWorkspace = kGemmBiasBytes + kGemmPanelBytes + kGemmSumsBytes;

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
  void layer_norm(const LayerNorm& a);     \
  void layer_norm_bwd(const LayerNormBwd& a); \
  void dropout(const Dropout& a);          \
  void adamw(const AdamW& a);              \
  void glu(const Glu& a);                  \
  void glu_bwd(const GluBwd& a);           \
  void rope(const Rope& a);                \
  void cross_entropy(const CrossEntropy& a); \
  void dequantize_4bit(const Dequantize4bit& a); \
  void quantize_4bit(const Quantize4bit& a); \
  void quantize_absmax(const QuantizeAbsmax& a); \
  void gemm(const Gemm& a);                \
  void attention(const AttentionFwd& a); \
  void attention_bwd(const AttentionBwd& a); \
  void philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]); \
  }

FUSELORA_DECLARE(scalar)
#if defined(__x86_64__)
FUSELORA_DECLARE(avx2)
FUSELORA_DECLARE(avx512)
FUSELORA_DECLARE(avx512_bf16)
#endif
#if defined(FUSELORA_HAS_AMX)
FUSELORA_DECLARE(amx)
#endif
#if defined(FUSELORA_HAS_AMX_EMULATED)
FUSELORA_DECLARE(amx_emulated)
#endif
#undef FUSELORA_DECLARE

}  // namespace fuselora
