// The inner loops of a product: a tile of rows of the left operand times a panel, sums in registers.
#pragma once

#include "cpu/gemm_panel.h"

namespace fuselora {
namespace FUSELORA_ISA {

// One number, widened, in all lanes.
static inline Vec spread(const float* x) { return splat(*x); }
#if defined(__AVX512F__)
static inline Vec spread(const bf16* x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(int16_t(x->bits)), 16))};
}
static inline Vec spread(const fp16* x) { return {_mm512_cvtph_ps(_mm256_set1_epi16(int16_t(x->bits)))}; }
#elif defined(__AVX2__)
static inline Vec spread(const bf16* x) {
  const __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(int16_t(x->bits)), 16));
  return {wide, wide};
}
static inline Vec spread(const fp16* x) {
  const __m256 wide = _mm256_cvtph_ps(_mm_set1_epi16(int16_t(x->bits)));
  return {wide, wide};
}
#else
template <class T>
static inline Vec spread(const T* x) { return splat(widen(*x)); }
#endif

// Multiply-adds in fp32: one k at a step.
template <class T>
struct Fma {
  using Left = T;
  using Panel = float;
  using Column = Vec;
  static constexpr int kDepth = 1;
  static inline Column column(const float* panel) { return load(panel, Full{}); }
  static inline Vec spread_left(const T* left) { return spread(left); }
  static inline Vec spread_last(const T* left) { return spread(left); }
  static inline Vec step(Vec sum, const Vec& left, const Column& column) { return fma(left, column, sum); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps: two k at a step.
struct Bf16Dot {
  using Left = bf16;
  using Panel = uint32_t;
  using Column = __m512i;
  static constexpr int kDepth = kPair;
  static inline Column column(const uint32_t* panel) { return _mm512_loadu_si512(panel); }
  static inline Column spread_left(const bf16* left) {
    int32_t pair;
    std::memcpy(&pair, left, 4);
    return _mm512_set1_epi32(pair);
  }
  static inline Column spread_last(const bf16* left) { return _mm512_set1_epi32(left->bits); }
  static inline Vec step(Vec sum, const Column& left, const Column& column) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)left, (__m512bh)column)};
  }
};
#endif

// A stretch of k of one term: rows of the left operand, contiguous in k.
template <class Left>
struct Stretch {
  const Left* left;
  int64_t stride, depth;
};

constexpr int kStretches = 16;

// What the next segment will read of its right operand, brought into the L2 cache a few lines at a time while tiles are
// computed. All lines at once would wait for memory as the loads do that they were to spare.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0;  // bytes that are read of each row
  int64_t lines = 0;                        // at a time
  int64_t row = 0, byte = 0;
  void fetch() {
    for (int64_t i = 0; i < lines && row < rows; ++i) {
      __builtin_prefetch(data + row * stride + byte, 0, 2);
      byte += kLine;
      if (byte >= bytes) ++row, byte = 0;
    }
  }
  static constexpr int64_t kLine = 64;
};

constexpr int64_t kFetchDepth = 64;  // of a tile's k from one fetch to the next

// Registers of sums: 24 of 32 with AVX-512, 12 of 16 (six pairs) with AVX2.
#if defined(__AVX512F__)
constexpr int kMaxVecs = 4, kSums = 24;
#else
constexpr int kMaxVecs = 1, kSums = 6;
#endif
constexpr int64_t kPanelColumns = kMaxVecs * kLanes;

template <class Dot>
struct Tile {
  const Stretch<typename Dot::Left>* stretches;
  int count;
  const typename Dot::Panel* panel;
  float* sums;       // of the depth so far, and the results if out is null: [rows, width], or if the panel holds the
  bool rests;        // whole depth and sums need not rest between panels, one tile's
  bool first, last;  // whether no depth came before, or none follows
  float alpha;
  const float* bias;  // [width]
  void* out;
  int64_t out_stride, columns;
  int32_t out_dtype;
  bool direct;   // whether results go from registers to out: [.., width] of Left
  Ahead* ahead;  // null if no stretch has any depth
};

template <class T>
static inline void store_sum(T* out, Vec x) { store(out, x, Full{}); }
#if defined(__AVX512BF16__)
// One instruction for eight. It takes subnormals for zero, as vdpbf16ps does with what it sums.
static inline void store_sum(bf16* out, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x.v));
}
#endif

// alpha * sums + bias of some rows to T; out null: to the sums.
template <class T>
static void write_rows(float* sums, int64_t width, float alpha, const float* bias, T* out, int64_t stride, int64_t columns,
                       int rows) {
  for (int i = 0; i < rows; ++i)
    each(columns, [&](int64_t j, auto lanes) {
      const Vec x = load(sums + i * width + j, Full{});
      store(out + i * stride + j, fma(x, splat(alpha), load(bias + j, Full{})), lanes);
    });
}

template <class Dot>
static void finish(const Tile<Dot>& t, float* sums, int64_t width, int64_t row, int rows) {
  const int64_t at = row * t.out_stride;
  if (!t.out) return write_rows(sums, width, t.alpha, t.bias, sums, width, width, rows);
  if (t.out_dtype == FUSELORA_BF16)
    return write_rows(sums, width, t.alpha, t.bias, static_cast<bf16*>(t.out) + at, t.out_stride, t.columns, rows);
  if (t.out_dtype == FUSELORA_F16)
    return write_rows(sums, width, t.alpha, t.bias, static_cast<fp16*>(t.out) + at, t.out_stride, t.columns, rows);
  write_rows(sums, width, t.alpha, t.bias, static_cast<float*>(t.out) + at, t.out_stride, t.columns, rows);
}

// What was summed before, and these sums, to `kept` or, finished, to out.
template <class Dot, int kVecs, int kRows>
static inline void add_sums(const Tile<Dot>& t, const Vec (&sums)[kRows][kVecs], float* kept, int64_t row) {
  constexpr int kWidth = kVecs * kLanes;
  if (t.last && t.direct) {
    typename Dot::Left* out = static_cast<typename Dot::Left*>(t.out) + row * t.out_stride;
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const Vec alpha = splat(t.alpha), bias = load(t.bias + j * kLanes, Full{});
#pragma GCC unroll 24
      for (int i = 0; i < kRows; ++i) {
        const Vec sum = t.first ? sums[i][j] : load(kept + i * kWidth + j * kLanes, Full{}) + sums[i][j];
        store_sum(out + i * t.out_stride + j * kLanes, fma(sum, alpha, bias));
      }
    }
    return;
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* at = kept + i * kWidth + j * kLanes;
      store(at, t.first ? sums[i][j] : load(at, Full{}) + sums[i][j], Full{});
    }
  if (t.last) finish(t, kept, kWidth, row, kRows);
}

// kRows rows from row on. Every loop over sums is unrolled, so that they stay in registers.
template <class Dot, int kVecs, int kRows>
__attribute__((noinline)) void tile(const Tile<Dot>& t, int64_t row) {
  constexpr int kWidth = kVecs * kLanes;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sums[i][j] = splat(0);
  const typename Dot::Panel* panel = t.panel;
  for (int s = 0; s < t.count; ++s) {
    const int64_t stride = t.stretches[s].stride, depth = t.stretches[s].depth, whole = depth - depth % Dot::kDepth;
    const typename Dot::Left* left = t.stretches[s].left + row * stride;
    typename Dot::Column columns[kVecs];
    for (int64_t k = 0; k < whole;) {
      t.ahead->fetch();
      const int64_t end = k + kFetchDepth < whole ? k + kFetchDepth : whole;
      for (; k < end; k += Dot::kDepth, panel += kWidth) {
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) columns[j] = Dot::column(panel + j * kLanes);
#pragma GCC unroll 24
        for (int i = 0; i < kRows; ++i) {
          const auto spread = Dot::spread_left(left + i * stride + k);
#pragma GCC unroll 4
          for (int j = 0; j < kVecs; ++j) sums[i][j] = Dot::step(sums[i][j], spread, columns[j]);
        }
      }
    }
    if (whole == depth) continue;
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) columns[j] = Dot::column(panel + j * kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
      const auto spread = Dot::spread_last(left + i * stride + depth - 1);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] = Dot::step(sums[i][j], spread, columns[j]);
    }
    panel += kWidth;
  }
  add_sums<Dot, kVecs, kRows>(t, sums, t.sums + (t.rests ? row * kWidth : 0), row);
}

constexpr int fewer_rows(int rows) { return rows > 16 ? 16 : rows > 8 ? 8 : rows > 4 ? 4 : rows > 2 ? 2 : 1; }

// All rows, as many at a time as the registers take.
template <class Dot, int kVecs, int kRows = kSums / kVecs>
static void tiles(const Tile<Dot>& t, int64_t rows, int64_t row = 0) {
  for (; row + kRows <= rows; row += kRows) tile<Dot, kVecs, kRows>(t, row);
  if constexpr (kRows > 1) tiles<Dot, kVecs, fewer_rows(kRows)>(t, rows, row);
}

template <class Dot>
static void tiles_of_width(const Tile<Dot>& t, int64_t width, int64_t rows) {
  if (width == kLanes) return tiles<Dot, 1>(t, rows);
#if defined(__AVX512F__)
  if (width == 2 * kLanes) return tiles<Dot, 2>(t, rows);
  if (width == 3 * kLanes) return tiles<Dot, 3>(t, rows);
  tiles<Dot, 4>(t, rows);
#endif
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
