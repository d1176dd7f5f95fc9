// Products of up to eight rows with 4-bit weights: there a panel costs more than it saves. Each weight is decoded once
// and multiplied where it lies, along k, by all rows; the lanes of a sum are added at the end.
#pragma once

#include "cpu/gemm_tile.h"

namespace fuselora {
namespace FUSELORA_ISA {

constexpr int64_t kFewRows = 8;

static inline float added(Vec lanes) { return sum(lanes); }

// Sixteen k at a step, in fp32.
template <class T>
struct FmaAlong {
  using Lanes = Vec;
  static constexpr int kWidth = kLanes;
  template <class Source>
  static inline Lanes at(const Source& source, int64_t row, int64_t k, int64_t n) { return source.sixteen(row, k, n); }
  static inline Vec step(Vec sum, const Lanes& x, const Lanes& w) { return fma(x, w, sum); }
};

#if defined(__AVX512BF16__)
struct Bf16Along {
  using Lanes = __m512i;
  static constexpr int kWidth = 2 * kLanes;
  template <class Source>
  static inline Lanes at(const Source& source, int64_t row, int64_t k, int64_t n) { return source.words(row, k, n); }
  static inline Vec step(Vec sum, const Lanes& x, const Lanes& w) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)x, (__m512bh)w)};
  }
};
#endif

// sums[i][j] += sum_k x(i, k) B(k, j) for kRows rows from the first one of x (the last one again where there are less)
// and kColumns columns from column on.
template <class Along, int kRows, int kColumns, class T, class Source>
static inline void dots(const Dense<T>& x, int64_t rows, int64_t depth, const Source& b, int64_t column, float* sums,
                        int64_t width) {
  Vec sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) sum[i][j] = splat(0);
  const auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    typename Along::Lanes columns[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) columns[j] = Along::at(b, column + j, k, n);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto left = Along::at(x, i < rows ? i : rows - 1, k, n);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) sum[i][j] = Along::step(sum[i][j], left, columns[j]);
    }
  };
  int64_t k = 0;
  for (; k + Along::kWidth <= depth; k += Along::kWidth) step(k, Along::kWidth);
  if (k < depth) step(k, depth - k);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j)
      if (i < rows) sums[i * width + j] += added(sum[i][j]);
}

template <class Along, int kRows, class T, class Source>
static void all_dots(const Dense<T>& x, int64_t rows, int64_t depth, const Source& b, int64_t j0, int64_t count,
                     float* sums, int64_t width) {
  constexpr int kColumns = kRows > 4 ? 2 : 4;
  int64_t j = 0;
  for (; j + kColumns <= count; j += kColumns)
    dots<Along, kRows, kColumns>(x, rows, depth, b, j0 + j, sums + j, width);
  for (; j < count; ++j) dots<Along, kRows, 1>(x, rows, depth, b, j0 + j, sums + j, width);
}

template <class Along, class T, class Source>
static void few_rows(const Dense<T>& x, int64_t rows, int64_t depth, const Source& b, int64_t j0, int64_t count,
                     float* sums, int64_t width) {
  if (rows == 1) return all_dots<Along, 1>(x, rows, depth, b, j0, count, sums, width);
  if (rows == 2) return all_dots<Along, 2>(x, rows, depth, b, j0, count, sums, width);
  if (rows <= 4) return all_dots<Along, 4>(x, rows, depth, b, j0, count, sums, width);
  all_dots<Along, 8>(x, rows, depth, b, j0, count, sums, width);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
