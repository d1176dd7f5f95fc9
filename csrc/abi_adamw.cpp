// The entry point of AdamW: argument checks, and which blocks belong to which tensor.
#include "cpu/kernels.h"
#include "dispatch.h"
#include "status.h"

using namespace fuselora;

int32_t fuselora_adamw(float* norm, void* const* params, const void* const* grads, void* const* low,
                       const int64_t* sizes, const int64_t* offsets, int64_t count, void* exp_avg, void* exp_avg_sq,
                       float* steps, const double* lrs, const double* decays, double beta1, double beta2, double eps,
                       double max_norm, const float* inv_scale, int32_t dtype, int32_t low_dtype, int32_t threads) {
  if (count < 1 || !is_dtype(dtype) || !is_dtype(low_dtype))
    return fail(FUSELORA_BAD_ARGUMENT, "adamw: bad argument: %lld tensors, dtypes %d %d", static_cast<long long>(count),
                dtype, low_dtype);
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (sizes[i] < 0 || offsets[i] < 0)
      return fail(FUSELORA_BAD_ARGUMENT, "adamw: bad argument: tensor %lld: size %lld, offset %lld",
                  static_cast<long long>(i), static_cast<long long>(sizes[i]), static_cast<long long>(offsets[i]));
    blocks += adamw_blocks(sizes[i]);
  }
  if (!kernels()) return FUSELORA_BAD_ISA;
  const int64_t floats = 2 * (count + 1) + blocks;  // an int64 takes two
  const Scratch memory = scratch(floats);
  if (!memory) return fail(FUSELORA_OUT_OF_MEMORY, "adamw: no memory for %lld floats", static_cast<long long>(floats));
  int64_t* first = reinterpret_cast<int64_t*>(memory.get());
  first[0] = 0;
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + adamw_blocks(sizes[i]);
  kernels()->adamw({norm, params, grads, low, sizes, offsets, first, memory.get() + 2 * (count + 1), count, exp_avg,
                    exp_avg_sq, steps, lrs, decays, beta1, beta2, eps, max_norm, inv_scale ? *inv_scale : 1.f, dtype,
                    low_dtype, threads});
  return FUSELORA_OK;
}
