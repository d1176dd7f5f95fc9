/* The whole C ABI of fuselora.
 *
 * Pointers are to contiguous memory of the caller unless there is a stride; sizes and strides are int64 and count
 * elements unless they say bytes. Every function that computes returns 0, or a fuselora_status whose sentence
 * fuselora_last_error() gives (per thread). Functions are reentrant. CPU functions end in `threads`, the largest
 * number of OpenMP threads to use; the results don't depend on it. CUDA functions (fuselora_cuda_*) are in a library
 * of their own, take device pointers of the current device, end in `void* stream` and return before the work is done.
 */
#ifndef FUSELORA_H
#define FUSELORA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FUSELORA_API __attribute__((visibility("default")))

enum fuselora_status {
  FUSELORA_OK = 0,
  FUSELORA_BAD_ARGUMENT = 1,
  FUSELORA_OUT_OF_MEMORY = 2,
  FUSELORA_BAD_ISA = 3,
  FUSELORA_CUDA_ERROR = 4
};
enum fuselora_dtype { FUSELORA_F32 = 0, FUSELORA_BF16 = 1, FUSELORA_F16 = 2 };
enum fuselora_norm_mode { FUSELORA_LLAMA = 0, FUSELORA_GEMMA = 1, FUSELORA_NONE = 2 };
enum fuselora_activation { FUSELORA_SILU = 0, FUSELORA_GELU = 1, FUSELORA_GELU_TANH = 2 };

/* Changes when a signature changes; the loader refuses another number. */
#define FUSELORA_ABI_VERSION 1
FUSELORA_API int32_t fuselora_abi_version(void);

/* The last failure on this thread, "" if there was none. Valid until the next failure on this thread. */
FUSELORA_API const char* fuselora_last_error(void);

/* The instruction set in use: "scalar", "avx2", "avx512", "avx512_bf16", "amx", or in builds for tests "amx_emulated"; NULL
 * if FUSELORA_CPU_ISA asks for one that is not there. */
FUSELORA_API const char* fuselora_cpu_isa(void);

/* Why a better instruction set than that, which the CPU has, can't be used; "" if there is none. */
FUSELORA_API const char* fuselora_cpu_isa_note(void);

/* RMSNorm forward with optional residual add; formulas and rounding in kernels/rms_norm.py.
 * x, residual (or NULL), h (written when residual is given): [rows, cols] of dtype; weight (or NULL): [cols] of
 * weight_dtype; y: [rows, cols], of fp32 if mode is FUSELORA_LLAMA and the two dtypes differ, else of dtype;
 * rstd: [rows]. */
FUSELORA_API int32_t fuselora_rms_norm(void* y, void* h, float* rstd, const void* x, const void* residual,
                                       const void* weight, int64_t rows, int64_t cols, int32_t dtype,
                                       int32_t weight_dtype, double eps, int32_t mode, int32_t threads);

/* RMSNorm backward. dy: [rows, cols] of dy_dtype, which is dtype or fp32; dh (or NULL), h, dx: [rows, cols] of dtype;
 * weight (or NULL), dw (or NULL: not wanted): [cols] of weight_dtype; rstd: [rows]. dw needs a weight. */
FUSELORA_API int32_t fuselora_rms_norm_bwd(void* dx, void* dw, const void* dy, const void* dh, const void* h,
                                           const void* weight, const float* rstd, int64_t rows, int64_t cols,
                                           int32_t dy_dtype, int32_t dtype, int32_t weight_dtype, int32_t mode,
                                           int32_t threads);

/* LayerNorm forward; formulas in kernels/layer_norm.py. x, y: [rows, cols] of dtype; weight, bias (or NULL): [cols] of
 * weight_dtype and bias_dtype; mean, rstd: [rows]. */
FUSELORA_API int32_t fuselora_layer_norm(void* y, float* mean, float* rstd, const void* x, const void* weight,
                                         const void* bias, int64_t rows, int64_t cols, int32_t dtype,
                                         int32_t weight_dtype, int32_t bias_dtype, double eps, int32_t threads);

/* Its backward. dy, x, dx: [rows, cols] of dtype; weight (or NULL): [cols] of weight_dtype; mean, rstd: [rows];
 * dw, db (or NULL: not wanted): [cols]. */
FUSELORA_API int32_t fuselora_layer_norm_bwd(void* dx, float* dw, float* db, const void* dy, const void* x,
                                             const void* weight, const float* mean, const float* rstd, int64_t rows,
                                             int64_t cols, int32_t dtype, int32_t weight_dtype, int32_t threads);

/* Counter-based dropout: y[i] = word(i) >= threshold ? x[i] * scale : 0, rounded once; y may be x.
 * word(i) is lane i % 4 of Philox-4x32-10 with counter (i / 4) in its two low words, zero in its two high words, and
 * the key (low word of seed, high word of seed). Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". */
FUSELORA_API int32_t fuselora_dropout(void* y, const void* x, int64_t n, int32_t dtype, uint64_t seed,
                                      uint32_t threshold, float scale, int32_t threads);

/* One AdamW update of `count` tensors, clipped by their joint gradient norm; formulas in kernels/adamw.py.
 * params, grads, low (or NULL): addresses of the tensors, of sizes[i] elements of dtype, low's of low_dtype; exp_avg,
 * exp_avg_sq: buffers of dtype in which tensor i begins at offsets[i]; steps, lrs, decays: [count]; inv_scale (or NULL):
 * one number. norm: one number, before clipping; where it is not finite nothing else is written. */
FUSELORA_API int32_t fuselora_adamw(float* norm, void* const* params, const void* const* grads, void* const* low,
                                    const int64_t* sizes, const int64_t* offsets, int64_t count, void* exp_avg,
                                    void* exp_avg_sq, float* steps, const double* lrs, const double* decays,
                                    double beta1, double beta2, double eps, double max_norm, const float* inv_scale,
                                    int32_t dtype, int32_t low_dtype, int32_t threads);

/* Gated linear unit activation h = act(gate) * up; formulas in kernels/glu.py. gate, up: [rows, cols] with row strides
 * and contiguous columns; h: [rows, cols]. */
FUSELORA_API int32_t fuselora_glu(void* h, const void* gate, const void* up, int64_t rows, int64_t cols,
                                  int64_t gate_stride, int64_t up_stride, int32_t dtype, int32_t act, int32_t threads);

/* Its backward. dh, gate, up: [rows, cols] with row strides; dgate, dup: [rows, cols], both with row stride d_stride;
 * h (or NULL: not wanted): [rows, cols]. */
FUSELORA_API int32_t fuselora_glu_bwd(void* dgate, void* dup, void* h, const void* dh, const void* gate, const void* up,
                                      int64_t rows, int64_t cols, int64_t d_stride, int64_t dh_stride,
                                      int64_t gate_stride, int64_t up_stride, int32_t dtype, int32_t act,
                                      int32_t threads);

/* Rotary position embedding of q and k, or its adjoint; formulas in kernels/rope.py. q: [batch, length, heads_q, width],
 * k: the same with heads_k, channels contiguous; strides: of batch, length and heads, q's then k's. y_q, y_k: contiguous.
 * cos, sin: [batch, length, rotary] of table_dtype, contiguous; table_batch_stride is 0 when all batches share one. */
FUSELORA_API int32_t fuselora_rope(void* y_q, void* y_k, const void* q, const void* k, const void* cos, const void* sin,
                                   int64_t batch, int64_t length, int64_t heads_q, int64_t heads_k, int64_t width,
                                   int64_t rotary, const int64_t strides[6], int64_t table_batch_stride, int32_t dtype,
                                   int32_t table_dtype, int32_t interleaved, int32_t adjoint, int32_t threads);

/* Cross-entropy of rows of logits; formulas in kernels/cross_entropy.py. x: [rows, cols] with a row stride; labels: [rows],
 * each in [0, cols) or ignore_index; loss, lse, entropy (or NULL): [rows]. With dx (or NULL; may be x): its gradient for
 * upstream, the gradient of loss, and dentropy (or NULL), that of entropy, [rows] each. Ignored rows give zeros. */
FUSELORA_API int32_t fuselora_cross_entropy(float* loss, float* lse, float* entropy, void* dx, const void* x,
                                            const int64_t* labels, const float* upstream, const float* dentropy,
                                            int64_t rows, int64_t cols, int64_t dx_stride, int64_t x_stride,
                                            int32_t dtype, int64_t ignore_index, double softcap, double label_smoothing,
                                            double logit_scale, double z_loss, int32_t threads);

/* A 4-bit weight of n elements to dtype; layout and formulas in kernels/nf4.py. data: [(n + 1) / 2]; code: [16]; absmax:
 * fp32 [blocks], or with absmax2 bytes [blocks], absmax2 [(blocks + blocksize2 - 1) / blocksize2], code2 [256], offset [1].
 * blocksize: a power of two, 32 to 4096. */
FUSELORA_API int32_t fuselora_dequantize_4bit(void* out, const uint8_t* data, const void* absmax, const float* code,
                                              const float* absmax2, const float* code2, const float* offset, int64_t n,
                                              int64_t blocksize, int64_t blocksize2, int32_t dtype, int32_t threads);

/* The other way: w [n] of dtype to data and fp32 absmax. bounds: the middles between neighbouring codes, ascending;
 * order: the nibbles of the codes, ascending in value. */
FUSELORA_API int32_t fuselora_quantize_4bit(uint8_t* data, float* absmax, const void* w, const float bounds[15],
                                            const uint8_t order[16], int64_t n, int64_t blocksize, int32_t dtype,
                                            int32_t threads);

/* The scales themselves: absmax [n] less offset [1] to codes [n] and fp32 absmax2 [(n + blocksize2 - 1) / blocksize2].
 * bounds: the middles between the 256 neighbouring codes, ascending. */
FUSELORA_API int32_t fuselora_quantize_absmax(uint8_t* codes, float* absmax2, const float* absmax, const float* offset,
                                              const float bounds[255], int64_t n, int64_t blocksize2, int32_t threads);

/* A 4-bit weight: the operands of fuselora_dequantize_4bit. */
typedef struct fuselora_weight_4bit {
  const uint8_t* data;
  const void* absmax;
  const float* code;
  const float* absmax2;
  const float* code2;
  const float* offset;
  int64_t blocksize, blocksize2;
} fuselora_weight_4bit;

/* A B, A [m, k] and B [k, n]. A: of the product's dtype, with a row stride. B: if b_by_rows its row k is at
 * b + k * b_stride, else its column j is at b + j * b_stride (a linear's weight). It is of b_dtype, and means
 * round(scale * B), or with rest what that rounding to the product's dtype left; or, with quantized (not NULL), it is
 * that weight with rows of b_stride elements. */
typedef struct fuselora_gemm_term {
  const void* a;
  int64_t a_row, k;
  const void* b;
  const fuselora_weight_4bit* quantized;
  int64_t b_stride;
  double scale;
  int32_t b_dtype, b_by_rows, rest, reserved;
} fuselora_gemm_term;

/* out = alpha * sum over terms of A B + bias, accumulated in fp32 and rounded once. out: [m, n] of out_dtype with strides,
 * one of which is 1; bias (or NULL): [n] of dtype. Keeps up to 0.5 MB per thread for the calling thread's next call. */
FUSELORA_API int32_t fuselora_gemm(void* out, int64_t out_row, int64_t out_col, int32_t out_dtype, int64_t m, int64_t n,
                                   const fuselora_gemm_term* terms, int32_t count, const void* bias, double alpha,
                                   int32_t dtype, int32_t threads);

/* Attention forward; formulas in kernels/attention.py. q: [batch, heads, length, width], k, v: [batch, kv_heads, keys,
 * width], channels contiguous; strides: of batch, head and position, q's, k's and v's; ranges (or NULL): [batch, length, 2],
 * the keys that each query may see; out: [batch, length, heads, width]; lse: [batch, heads, length]. scale > 0; window and
 * softcap are 0 for none; width: even; keys: below 2^24. */
FUSELORA_API int32_t fuselora_attention(void* out, float* lse, const void* q, const void* k, const void* v,
                                        const int32_t* ranges, int64_t batch, int64_t heads, int64_t kv_heads,
                                        int64_t length, int64_t keys, int64_t width, const int64_t strides[9],
                                        int32_t dtype, double scale, int32_t causal, int64_t window, double softcap,
                                        int32_t threads);

/* Its backward. dout, out, dq: [batch, length, heads, width]; dk, dv: [batch, keys, kv_heads, width]; all contiguous. */
FUSELORA_API int32_t fuselora_attention_bwd(void* dq, void* dk, void* dv, const void* dout, const void* q,
                                            const void* k, const void* v, const void* out, const float* lse,
                                            const int32_t* ranges, int64_t batch, int64_t heads, int64_t kv_heads,
                                            int64_t length, int64_t keys, int64_t width, const int64_t strides[9],
                                            int32_t dtype, double scale, int32_t causal, int64_t window,
                                            double softcap, int32_t threads);

/* One Philox-4x32-10 block, for known-answer tests: out = philox(counter, key). */
FUSELORA_API void fuselora_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]);

/* The same two of the CUDA library. */
FUSELORA_API int32_t fuselora_cuda_abi_version(void);
FUSELORA_API const char* fuselora_cuda_last_error(void);

/* 0 if the current device and its driver can run this library's kernels. */
FUSELORA_API int32_t fuselora_cuda_check(void);

/* fuselora_dequantize_4bit on a GPU, in one launch. Fast where out is a multiple of 16 bytes, data of 4, and blocksize2 a
 * power of two; right anywhere. */
FUSELORA_API int32_t fuselora_cuda_dequantize_4bit(void* out, const uint8_t* data, const void* absmax,
                                                   const float* code, const float* absmax2, const float* code2,
                                                   const float* offset, int64_t n, int64_t blocksize,
                                                   int64_t blocksize2, int32_t dtype, void* stream);

/* y = x W^T + bias. x: [m, cols], y: [m, rows], bias (or NULL): [rows], all of dtype, bf16 or fp16; W: a 4-bit weight
 * [rows, cols]. m: 1 to 8; cols: a multiple of 64; blocksize: 64 or more; blocksize2: a power of two; x on a multiple of
 * 16 bytes, data of 8; compute capability 8.0 or later. */
FUSELORA_API int32_t fuselora_cuda_matmul_4bit(void* y, const void* x, const uint8_t* data, const void* absmax,
                                               const float* code, const float* absmax2, const float* code2,
                                               const float* offset, const void* bias, int64_t m, int64_t rows,
                                               int64_t cols, int64_t blocksize, int64_t blocksize2, int32_t dtype,
                                               void* stream);

#ifdef __cplusplus
}
#endif

#endif
