// What a tile of queries of one head may see, and where its tensors lie.
#pragma once

#include "cpu/attention_tile.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fuselora {
namespace FUSELORA_ISA {

static inline int64_t thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

static inline int attention_team(const Attention& a) {
  return team(a.batch * a.heads * a.length * a.keys, a.threads);
}

// Every mask is an interval of keys for each query: [lo, hi), as exact floats; first and last bound all of them.
struct Scope {
  float lo[kQueries], hi[kQueries];
  int64_t first, last;
};

// Queries [q0, q0 + count) of batch b. Lanes behind the last query repeat it, so that a tile can be seen in full.
static void find_scope(const Attention& a, int64_t b, int64_t q0, int64_t count, Scope& scope) {
  scope.first = a.keys;
  scope.last = 0;
  for (int64_t i = 0; i < kQueries; ++i) {
    const int64_t query = q0 + smaller(i, count - 1), position = query + a.keys - a.length;
    int64_t lo = 0, hi = a.keys;
    if (a.ranges) {
      const int32_t* range = a.ranges + (b * a.length + query) * 2;
      lo = larger_of(lo, range[0]);
      hi = smaller(hi, range[1]);
    }
    if (a.causal) hi = smaller(hi, position + 1);
    if (a.window) lo = larger_of(lo, position - a.window + 1);
    if (lo >= hi) lo = hi = 0;
    scope.lo[i] = float(lo);
    scope.hi[i] = float(hi);
    if (lo < hi) {
      scope.first = smaller(scope.first, lo);
      scope.last = larger_of(scope.last, hi);
    }
  }
}

enum class Seen { kNone, kSome, kAll };

// How much of keys [begin, end) the queries see.
static Seen seen(const Scope& scope, int64_t begin, int64_t end) {
  const float from = float(begin), to = float(end);
  int any = 0, all = 1;
  for (int64_t i = 0; i < kQueries; ++i) {
    any |= scope.lo[i] < to && scope.hi[i] > from;
    all &= scope.lo[i] <= from && scope.hi[i] >= to;
  }
  return all ? Seen::kAll : any ? Seen::kSome : Seen::kNone;
}

// x where the sixteen queries see the key, else `hidden`.
static inline Vec visible(const Scope& scope, int64_t lane, int64_t key, Vec x, Vec hidden) {
  const Vec at = splat(float(key)), lo = load(scope.lo + lane, Full{}), hi = load(scope.hi + lane, Full{});
  return select(at, lo, hidden, select(at, hi, x, hidden));
}

// The part of the key tile at `begin` that the queries see. The first key is even: pairs stay pairs.
struct Keys {
  int64_t begin, first, count;
  Keys(const Scope& scope, int64_t tile)
      : begin(tile * kKeys),
        first(larger_of(begin, scope.first & ~int64_t(1))),
        count(smaller(begin + kKeys, scope.last) - first) {}
};

// Rows of one head in a strided [batch, heads, positions, width].
template <class T>
struct Rows {
  const T* p;
  int64_t stride;
  const T* operator[](int64_t row) const { return p + row * stride; }
};

template <class T>
static inline Rows<T> head_rows(const void* x, const int64_t* strides, int64_t b, int64_t head) {
  return {static_cast<const T*>(x) + b * strides[0] + head * strides[1], strides[2]};
}

// K or V as left operands: in place where storage is the operand's type, else widened into `copy`.
template <class T, class E>
static inline Rows<E> operand_rows(Rows<T> x, E* copy, int64_t width) {
  if constexpr (sizeof(T) == sizeof(E)) {
    return {reinterpret_cast<const E*>(x.p), x.stride};
  } else {
    return {copy, width};
  }
}

// y [rows, width] of T with a row stride = factor * turned^T, where turned is [padded width, kQueries].
template <class T>
static void store_turned(const float* turned, float factor, int64_t rows, int64_t width, T* y, int64_t stride) {
  alignas(64) float tile[kLanes * kLanes];
  const Vec by = splat(factor);
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < width; j += kLanes) {
      transpose16(turned + j * kQueries + i, kQueries, tile, kLanes);
      for (int64_t r = 0; r < smaller(kLanes, rows - i); ++r)
        store_some(y + (i + r) * stride + j, load(tile + r * kLanes, Full{}) * by, width - j);
    }
  }
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
