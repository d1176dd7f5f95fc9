// The C ABI's LayerNorm on the CPU: argument checks and scratch memory.
#include "dispatch.h"
#include "status.h"

using namespace fuselora;

int32_t fuselora_layer_norm(void* y, float* mean, float* rstd, const void* x, const void* weight, const void* bias,
                            int64_t rows, int64_t cols, int32_t dtype, int32_t weight_dtype, int32_t bias_dtype,
                            double eps, int32_t threads) {
  if (rows < 0 || cols < 0 || !is_dtype(dtype) || !is_dtype(weight_dtype) || !is_dtype(bias_dtype))
    return fail(FUSELORA_BAD_ARGUMENT, "layer_norm: bad argument: rows %lld, cols %lld, dtypes %d %d %d",
                static_cast<long long>(rows), static_cast<long long>(cols), dtype, weight_dtype, bias_dtype);
  if (!kernels()) return FUSELORA_BAD_ISA;
  if (rows == 0 || cols == 0) return FUSELORA_OK;
  const Scratch memory = scratch(2 * cols);
  if (!memory)
    return fail(FUSELORA_OUT_OF_MEMORY, "layer_norm: no memory for %lld floats", static_cast<long long>(2 * cols));
  kernels()->layer_norm({y, mean, rstd, x, weight, bias, memory.get(), memory.get() + cols, rows, cols, dtype,
                         weight_dtype, bias_dtype, static_cast<float>(eps), threads});
  return FUSELORA_OK;
}

int32_t fuselora_layer_norm_bwd(void* dx, float* dw, float* db, const void* dy, const void* x, const void* weight,
                                const float* mean, const float* rstd, int64_t rows, int64_t cols, int32_t dtype,
                                int32_t weight_dtype, int32_t threads) {
  if (rows < 0 || cols < 0 || !is_dtype(dtype) || !is_dtype(weight_dtype))
    return fail(FUSELORA_BAD_ARGUMENT, "layer_norm_bwd: bad argument: rows %lld, cols %lld, dtypes %d %d",
                static_cast<long long>(rows), static_cast<long long>(cols), dtype, weight_dtype);
  if (!kernels()) return FUSELORA_BAD_ISA;
  if (cols == 0) return FUSELORA_OK;
  const int64_t partials = dw_blocks(rows) * 2 * cols, count = cols + (dw ? partials : 0) + (db ? partials : 0);
  const Scratch memory = scratch(count);
  if (!memory)
    return fail(FUSELORA_OUT_OF_MEMORY, "layer_norm_bwd: no memory for %lld floats", static_cast<long long>(count));
  float* dw_partials = memory.get() + cols;
  kernels()->layer_norm_bwd({dx, dw, db, dy, x, weight, mean, rstd, memory.get(), dw_partials,
                             dw ? dw_partials + partials : dw_partials, rows, cols, dtype, weight_dtype, threads});
  return FUSELORA_OK;
}
