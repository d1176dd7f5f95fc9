// What RMSNorm and LayerNorm share: their vectors in fp32, and the last levels of the sum of a weight's gradient.
#pragma once
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fuselora {
namespace FUSELORA_ISA {

// out[j] = vector[j] in fp32 + offset, or absent without a vector.
template <class W>
static inline void fill_vector(float* out, const W* vector, int64_t cols, float offset, float absent) {
  const Vec added = splat(offset), instead = splat(absent);
  each(cols, [&](int64_t j, auto lanes) { store(out + j, vector ? load(vector + j, lanes) + added : instead, lanes); });
}

static inline void fill_vector(float* out, const void* vector, int32_t dtype, int64_t cols, float offset, float absent) {
  if (dtype == FUSELORA_BF16) return fill_vector(out, static_cast<const bf16*>(vector), cols, offset, absent);
  if (dtype == FUSELORA_F16) return fill_vector(out, static_cast<const fp16*>(vector), cols, offset, absent);
  fill_vector(out, static_cast<const float*>(vector), cols, offset, absent);
}

// total += recent, and recent = 0.
static inline void flush(float* total, float* recent, int64_t cols) {
  each(cols, [&](int64_t j, auto lanes) {
    store(total + j, load(total + j, lanes) + load(recent + j, lanes), lanes);
    store(recent + j, splat(0), lanes);
  });
}

// dw = sum of the blocks' totals, in block order for every column; partials: [dw_blocks(rows), 2, cols].
template <class W>
static inline void reduce_blocks(W* dw, const float* partials, int64_t rows, int64_t cols, int32_t most_threads) {
  const int64_t blocks = dw_blocks(rows), width = 1024;
  const int threads = team(blocks * cols, most_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t start = 0; start < cols; start += width) {
    each(cols - start < width ? cols - start : width, [&](int64_t j, auto lanes) {
      Vec total = splat(0);
      for (int64_t first = 0; first < blocks; first += kDwRows) {
        const int64_t end = first + kDwRows < blocks ? first + kDwRows : blocks;
        Vec group = splat(0);
        for (int64_t block = first; block < end; ++block)
          group = group + load(partials + 2 * block * cols + start + j, lanes);
        total = total + group;
      }
      store(dw + start + j, total, lanes);
    });
  }
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
