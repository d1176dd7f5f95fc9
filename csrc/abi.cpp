// The C ABI's entry points on the CPU: argument checks and scratch memory.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#include "dispatch.h"
#include "status.h"

namespace fuselora {
namespace {

bool is_activation(int32_t act) { return act == FUSELORA_SILU || act == FUSELORA_GELU || act == FUSELORA_GELU_TANH; }

bool is_mode(int32_t mode) { return mode == FUSELORA_LLAMA || mode == FUSELORA_GEMMA || mode == FUSELORA_NONE; }

// Grows to the largest request of its thread and is freed with it: a product takes half a megabyte per thread, which
// malloc would map and unmap, page by page, at every call.
char* gemm_workspace(int64_t bytes) {
  static thread_local Scratch memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, size_t(bytes))));
    size = memory ? bytes : 0;
  }
  return reinterpret_cast<char*>(memory.get());
}

// Memory that a thread keeps for its next calls, as steps repeat: fresh pages cost a fault each. What is larger than kKept
// is given back after the call.
constexpr size_t kKept = size_t(64) << 20;

class Workspace {
 public:
  ~Workspace() { std::free(memory_); }
  // `count` floats aligned to 64 bytes, or nullptr.
  float* take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(float) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, bytes);
      bytes_ = memory_ ? bytes : 0;
    }
    return static_cast<float*>(memory_);
  }
  void trim() {
    if (bytes_ <= kKept) return;
    std::free(memory_);
    memory_ = nullptr;
    bytes_ = 0;
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

thread_local Workspace workspace;

// Why attention can't take these arguments, or FUSELORA_OK.
int32_t check_attention(const char* op, const Attention& a) {
  const bool sizes = a.batch >= 0 && a.heads >= 1 && a.kv_heads >= 1 && a.heads % a.kv_heads == 0 && a.length >= 0 &&
                     a.keys >= 0 && a.keys < (1 << 24) && a.width >= 2 && a.width % 2 == 0;
  if (sizes && is_dtype(a.dtype) && a.scale > 0 && a.window >= 0 && a.softcap >= 0) return FUSELORA_OK;
  return fail(FUSELORA_BAD_ARGUMENT,
              "%s: bad argument: batch %lld, heads %lld %lld, lengths %lld %lld, width %lld, dtype %d, scale %g, window "
              "%lld, softcap %g",
              op, static_cast<long long>(a.batch), static_cast<long long>(a.heads), static_cast<long long>(a.kv_heads),
              static_cast<long long>(a.length), static_cast<long long>(a.keys), static_cast<long long>(a.width), a.dtype,
              a.scale, static_cast<long long>(a.window), a.softcap);
}

}  // namespace
}  // namespace fuselora

using namespace fuselora;

int32_t fuselora_abi_version(void) { return FUSELORA_ABI_VERSION; }

const char* fuselora_last_error(void) { return last_error; }

const char* fuselora_cpu_isa(void) { return kernels() ? kernels()->isa : nullptr; }

const char* fuselora_cpu_isa_note(void) { return kernels() ? isa_note : ""; }

int32_t fuselora_rms_norm(void* y, void* h, float* rstd, const void* x, const void* residual, const void* weight,
                          int64_t rows, int64_t cols, int32_t dtype, int32_t weight_dtype, double eps, int32_t mode,
                          int32_t threads) {
  if (rows < 0 || cols < 0 || !is_dtype(dtype) || !is_dtype(weight_dtype) || !is_mode(mode))
    return fail(FUSELORA_BAD_ARGUMENT, "rms_norm: bad argument: rows %lld, cols %lld, dtypes %d %d, mode %d",
                static_cast<long long>(rows), static_cast<long long>(cols), dtype, weight_dtype, mode);
  if (!kernels()) return FUSELORA_BAD_ISA;
  if (rows == 0 || cols == 0) return FUSELORA_OK;
  const Scratch scale = scratch(cols);
  if (!scale) return fail(FUSELORA_OUT_OF_MEMORY, "rms_norm: no memory for %lld floats", static_cast<long long>(cols));
  kernels()->rms_norm({y, h, rstd, x, residual, weight, scale.get(), rows, cols, dtype, weight_dtype,
                       static_cast<float>(eps), mode, threads});
  return FUSELORA_OK;
}

int32_t fuselora_rms_norm_bwd(void* dx, void* dw, const void* dy, const void* dh, const void* h, const void* weight,
                              const float* rstd, int64_t rows, int64_t cols, int32_t dy_dtype, int32_t dtype,
                              int32_t weight_dtype, int32_t mode, int32_t threads) {
  const bool dy_fits = dy_dtype == dtype || dy_dtype == FUSELORA_F32;
  if (rows < 0 || cols < 0 || !is_dtype(dtype) || !dy_fits || !is_dtype(weight_dtype) || !is_mode(mode) ||
      (dw && !weight))
    return fail(FUSELORA_BAD_ARGUMENT,
                "rms_norm_bwd: bad argument: rows %lld, cols %lld, dtypes %d %d %d, mode %d, dw %s weight",
                static_cast<long long>(rows), static_cast<long long>(cols), dy_dtype, dtype, weight_dtype, mode,
                weight ? "with" : "without");
  if (!kernels()) return FUSELORA_BAD_ISA;
  if (cols == 0) return FUSELORA_OK;
  const int64_t partials_size = dw ? dw_blocks(rows) * 2 * cols : 0;
  const Scratch memory = scratch(cols + partials_size);
  if (!memory)
    return fail(FUSELORA_OUT_OF_MEMORY, "rms_norm_bwd: no memory for %lld floats",
                static_cast<long long>(cols + partials_size));
  kernels()->rms_norm_bwd({dx, dw, dy, dh, h, weight, rstd, memory.get(), memory.get() + cols, rows, cols, dy_dtype,
                           dtype, weight_dtype, mode, threads});
  return FUSELORA_OK;
}

int32_t fuselora_dropout(void* y, const void* x, int64_t n, int32_t dtype, uint64_t seed, uint32_t threshold,
                         float scale, int32_t threads) {
  if (n < 0 || !is_dtype(dtype))
    return fail(FUSELORA_BAD_ARGUMENT, "dropout: bad argument: n %lld, dtype %d", static_cast<long long>(n), dtype);
  if (!kernels()) return FUSELORA_BAD_ISA;
  kernels()->dropout({y, x, n, dtype, seed, threshold, scale, threads});
  return FUSELORA_OK;
}

int32_t fuselora_glu(void* h, const void* gate, const void* up, int64_t rows, int64_t cols, int64_t gate_stride,
                     int64_t up_stride, int32_t dtype, int32_t act, int32_t threads) {
  if (rows < 0 || cols < 0 || !is_dtype(dtype) || !is_activation(act))
    return fail(FUSELORA_BAD_ARGUMENT, "glu: bad argument: rows %lld, cols %lld, dtype %d, act %d",
                static_cast<long long>(rows), static_cast<long long>(cols), dtype, act);
  if (!kernels()) return FUSELORA_BAD_ISA;
  kernels()->glu({h, gate, up, rows, cols, gate_stride, up_stride, dtype, act, threads});
  return FUSELORA_OK;
}

int32_t fuselora_glu_bwd(void* dgate, void* dup, void* h, const void* dh, const void* gate, const void* up, int64_t rows,
                         int64_t cols, int64_t d_stride, int64_t dh_stride, int64_t gate_stride, int64_t up_stride,
                         int32_t dtype, int32_t act, int32_t threads) {
  if (rows < 0 || cols < 0 || !is_dtype(dtype) || !is_activation(act))
    return fail(FUSELORA_BAD_ARGUMENT, "glu_bwd: bad argument: rows %lld, cols %lld, dtype %d, act %d",
                static_cast<long long>(rows), static_cast<long long>(cols), dtype, act);
  if (!kernels()) return FUSELORA_BAD_ISA;
  kernels()->glu_bwd({dgate, dup, h, dh, gate, up, rows, cols, d_stride, dh_stride, gate_stride, up_stride, dtype, act,
                      threads});
  return FUSELORA_OK;
}

int32_t fuselora_rope(void* y_q, void* y_k, const void* q, const void* k, const void* cos, const void* sin,
                      int64_t batch, int64_t length, int64_t heads_q, int64_t heads_k, int64_t width, int64_t rotary,
                      const int64_t strides[6], int64_t table_batch_stride, int32_t dtype, int32_t table_dtype,
                      int32_t interleaved, int32_t adjoint, int32_t threads) {
  if (batch < 0 || length < 0 || heads_q < 0 || heads_k < 0 || rotary < 0 || rotary % 2 || rotary > width ||
      !is_dtype(dtype) || !is_dtype(table_dtype))
    return fail(FUSELORA_BAD_ARGUMENT,
                "rope: bad argument: batch %lld, length %lld, heads %lld %lld, width %lld, rotary %lld, dtypes %d %d",
                static_cast<long long>(batch), static_cast<long long>(length), static_cast<long long>(heads_q),
                static_cast<long long>(heads_k), static_cast<long long>(width), static_cast<long long>(rotary), dtype,
                table_dtype);
  if (!kernels()) return FUSELORA_BAD_ISA;
  kernels()->rope({y_q, y_k, q, k, cos, sin, batch, length, heads_q, heads_k, width, rotary, strides, table_batch_stride,
                   dtype, table_dtype, interleaved != 0, adjoint != 0, threads});
  return FUSELORA_OK;
}

int32_t fuselora_cross_entropy(float* loss, float* lse, float* entropy, void* dx, const void* x, const int64_t* labels,
                               const float* upstream, const float* dentropy, int64_t rows, int64_t cols,
                               int64_t dx_stride, int64_t x_stride, int32_t dtype, int64_t ignore_index, double softcap,
                               double label_smoothing, double logit_scale, double z_loss, int32_t threads) {
  if (rows < 0 || cols < 1 || !is_dtype(dtype) || (dx && !upstream))
    return fail(FUSELORA_BAD_ARGUMENT, "cross_entropy: bad argument: rows %lld, cols %lld, dtype %d, dx %s upstream",
                static_cast<long long>(rows), static_cast<long long>(cols), dtype, upstream ? "with" : "without");
  for (int64_t i = 0; i < rows; ++i)
    if (labels[i] != ignore_index && (labels[i] < 0 || labels[i] >= cols))
      return fail(FUSELORA_BAD_ARGUMENT, "cross_entropy: bad argument: label %lld in row %lld, %lld columns",
                  static_cast<long long>(labels[i]), static_cast<long long>(i), static_cast<long long>(cols));
  if (!kernels()) return FUSELORA_BAD_ISA;
  kernels()->cross_entropy({loss, lse, entropy, dx, x, labels, upstream, dentropy, rows, cols, dx_stride, x_stride, dtype,
                            ignore_index, static_cast<float>(softcap), static_cast<float>(label_smoothing),
                            static_cast<float>(logit_scale), static_cast<float>(z_loss), threads});
  return FUSELORA_OK;
}

int32_t fuselora_dequantize_4bit(void* out, const uint8_t* data, const void* absmax, const float* code,
                                 const float* absmax2, const float* code2, const float* offset, int64_t n,
                                 int64_t blocksize, int64_t blocksize2, int32_t dtype, int32_t threads) {
  if (n < 0 || !is_blocksize(blocksize) || blocksize2 < 1 || !is_dtype(dtype) || (absmax2 && (!code2 || !offset)))
    return fail(FUSELORA_BAD_ARGUMENT, "dequantize_4bit: bad argument: n %lld, block sizes %lld %lld, dtype %d, %s",
                static_cast<long long>(n), static_cast<long long>(blocksize), static_cast<long long>(blocksize2), dtype,
                absmax2 ? "nested" : "plain");
  if (!kernels()) return FUSELORA_BAD_ISA;
  kernels()->dequantize_4bit({out, {data, absmax, code, absmax2, code2, offset, blocksize, blocksize2}, n, dtype, threads});
  return FUSELORA_OK;
}

int32_t fuselora_quantize_4bit(uint8_t* data, float* absmax, const void* w, const float bounds[15],
                               const uint8_t order[16], int64_t n, int64_t blocksize, int32_t dtype, int32_t threads) {
  if (n < 0 || !is_blocksize(blocksize) || !is_dtype(dtype))
    return fail(FUSELORA_BAD_ARGUMENT, "quantize_4bit: bad argument: n %lld, block size %lld, dtype %d",
                static_cast<long long>(n), static_cast<long long>(blocksize), dtype);
  if (!kernels()) return FUSELORA_BAD_ISA;
  kernels()->quantize_4bit({data, absmax, w, bounds, order, n, blocksize, dtype, threads});
  return FUSELORA_OK;
}

int32_t fuselora_quantize_absmax(uint8_t* codes, float* absmax2, const float* absmax, const float* offset,
                                 const float bounds[255], int64_t n, int64_t blocksize2, int32_t threads) {
  if (n < 0 || blocksize2 < 1)
    return fail(FUSELORA_BAD_ARGUMENT, "quantize_absmax: bad argument: n %lld, block size %lld",
                static_cast<long long>(n), static_cast<long long>(blocksize2));
  if (!kernels()) return FUSELORA_BAD_ISA;
  kernels()->quantize_absmax({codes, absmax2, absmax, offset, bounds, n, blocksize2, threads});
  return FUSELORA_OK;
}

static bool is_term(const fuselora_gemm_term& t) {
  const bool weight = t.quantized ? is_blocksize(t.quantized->blocksize) && t.quantized->blocksize2 >= 1
                                  : t.b && is_dtype(t.b_dtype);
  return t.a && weight && t.k >= 1;
}

int32_t fuselora_gemm(void* out, int64_t out_row, int64_t out_col, int32_t out_dtype, int64_t m, int64_t n,
                      const fuselora_gemm_term* terms, int32_t count, const void* bias, double alpha, int32_t dtype,
                      int32_t threads) {
  if (m < 0 || n < 0 || count < 1 || !is_dtype(dtype) || !is_dtype(out_dtype) || (out_row != 1 && out_col != 1))
    return fail(FUSELORA_BAD_ARGUMENT, "gemm: bad argument: m %lld, n %lld, %d terms, dtypes %d %d, strides %lld %lld",
                static_cast<long long>(m), static_cast<long long>(n), count, dtype, out_dtype,
                static_cast<long long>(out_row), static_cast<long long>(out_col));
  for (int32_t i = 0; i < count; ++i)
    if (!is_term(terms[i]))
      return fail(FUSELORA_BAD_ARGUMENT, "gemm: bad argument: term %d: k %lld, right dtype %d, %s", i,
                  static_cast<long long>(terms[i].k), terms[i].b_dtype, terms[i].quantized ? "4-bit" : "dense");
  if (!kernels()) return FUSELORA_BAD_ISA;
  if (m == 0 || n == 0) return FUSELORA_OK;
  const int32_t team_size = threads < 1 ? 1 : threads;
  char* workspace = gemm_workspace(team_size * kGemmWorkspace);
  if (!workspace)
    return fail(FUSELORA_OUT_OF_MEMORY, "gemm: no memory for %lld bytes",
                static_cast<long long>(team_size * kGemmWorkspace));
  kernels()->gemm({out, out_row, out_col, m, n, terms, count, bias, static_cast<float>(alpha), out_dtype, dtype, team_size,
                   workspace});
  return FUSELORA_OK;
}

int32_t fuselora_attention(void* out, float* lse, const void* q, const void* k, const void* v, const int32_t* ranges,
                           int64_t batch, int64_t heads, int64_t kv_heads, int64_t length, int64_t keys, int64_t width,
                           const int64_t strides[9], int32_t dtype, double scale, int32_t causal, int64_t window,
                           double softcap, int32_t threads) {
  Attention a{q, k, v, ranges, batch, heads, kv_heads, length, keys, width, strides, dtype, static_cast<float>(scale),
              causal != 0, window, static_cast<float>(softcap), threads, nullptr};
  if (const int32_t bad = check_attention("attention", a)) return bad;
  if (!kernels()) return FUSELORA_BAD_ISA;
  a.scratch = workspace.take(attention_scratch(a));
  if (!a.scratch)
    return fail(FUSELORA_OUT_OF_MEMORY, "attention: no memory for %lld floats",
                static_cast<long long>(attention_scratch(a)));
  kernels()->attention({a, out, lse});
  workspace.trim();
  return FUSELORA_OK;
}

int32_t fuselora_attention_bwd(void* dq, void* dk, void* dv, const void* dout, const void* q, const void* k,
                               const void* v, const void* out, const float* lse, const int32_t* ranges, int64_t batch,
                               int64_t heads, int64_t kv_heads, int64_t length, int64_t keys, int64_t width,
                               const int64_t strides[9], int32_t dtype, double scale, int32_t causal, int64_t window,
                               double softcap, int32_t threads) {
  Attention a{q, k, v, ranges, batch, heads, kv_heads, length, keys, width, strides, dtype, static_cast<float>(scale),
              causal != 0, window, static_cast<float>(softcap), threads, nullptr};
  if (const int32_t bad = check_attention("attention_bwd", a)) return bad;
  if (!kernels()) return FUSELORA_BAD_ISA;
  a.scratch = workspace.take(attention_bwd_scratch(a));
  if (!a.scratch)
    return fail(FUSELORA_OUT_OF_MEMORY, "attention_bwd: no memory for %lld floats",
                static_cast<long long>(attention_bwd_scratch(a)));
  kernels()->attention_bwd({a, dq, dk, dv, dout, out, lse});
  workspace.trim();
  return FUSELORA_OK;
}

void fuselora_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
  // A known-answer test must reach the kernel that dropout would use; without one the answer is visibly wrong.
  if (kernels()) return kernels()->philox(out, counter, key);
  std::memset(out, 0, 4 * sizeof(uint32_t));
}
