// Attention forward. Formulas: kernels/attention.py. A task is one tile of queries of one head; it walks over the tiles
// of keys with a running maximum and sum (online softmax), with scores and output turned so that lanes are queries:
//   S^T = K Q^T,   P^T = e^(S^T - max),   O^T = O^T * e^(old max - max) + V^T P^T
#include "cpu/attention_scope.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

// What a thread works in.
struct Work {
  float* queries;  // Q^T: [words of width, kQueries]
  float* scores;   // S^T: [kKeys, kQueries]
  float* weights;  // P^T: [words of kKeys, kQueries]
  float* sums;     // O^T: [padded width, kQueries]
  float* top;      // the largest score so far, before scaling: [kQueries]
  float* total;    // sum of weights
  float* fade;     // e^(old maximum - maximum)
  Scope scope;
  Work(const Attention& a, float* p)
      : queries(p),
        scores(queries + padded_width(a) * kQueries),
        weights(scores + kKeys * kQueries),
        sums(weights + kKeys * kQueries),
        top(sums + padded_width(a) * kQueries),
        total(top + kQueries),
        fade(total + kQueries) {}
};

// Scores capped and masked in place.
template <class E>
void limit_scores(const Attention& a, Work& w, const Keys& keys, int64_t lane) {
  for (int64_t row = 0; row < keys.count; ++row) {
    float* at = w.scores + row * kQueries + lane;
    Vec s = load(at, Full{});
    if (a.softcap > 0) s = splat(a.softcap) * tanh(s * splat(a.scale / a.softcap));
    store(at, visible(w.scope, lane, keys.first + row, s, splat(kHidden)), Full{});
  }
}

// Scores to weights, for sixteen queries.
template <class E>
void weigh(const Attention& a, Work& w, int64_t count, int64_t lane) {
  const Vec unit = splat((a.softcap > 0 ? 1.f : a.scale) * kLog<E>);
  const float* s = w.scores + lane;
  const Vec before = load(w.top + lane, Full{});
  Vec top = before, other = before;
  for (int64_t row = 0; row + 1 < count; row += 2) {
    top = maximum(top, load(s + row * kQueries, Full{}));
    other = maximum(other, load(s + (row + 1) * kQueries, Full{}));
  }
  if (count % 2) top = maximum(top, load(s + (count - 1) * kQueries, Full{}));
  top = maximum(top, other);
  const Vec offset = splat(0.f) - top * unit;
  Vec even = splat(0.f), odd = even;
  int64_t row = 0;
  for (; row + 1 < count; row += 2) {
    const Vec p0 = power_of<E>(load(s + row * kQueries, Full{}), unit, offset);
    const Vec p1 = power_of<E>(load(s + (row + 1) * kQueries, Full{}), unit, offset);
    even = even + p0;
    odd = odd + p1;
    store_rows<E>(w.weights, row, lane, p0, p1);
  }
  if (row < count) {
    const Vec p = power_of<E>(load(s + row * kQueries, Full{}), unit, offset);
    even = even + p;
    store_rows<E>(w.weights, row, lane, p, splat(0.f));
  }
  // From the rounded products that the weights' exponents hold: the sum stays relative to the latest of them.
  const Vec fade = power<E>(before * unit + offset);
  store(w.fade + lane, fade, Full{});
  store(w.top + lane, top, Full{});
  store(w.total + lane, fma(load(w.total + lane, Full{}), fade, even + odd), Full{});
}

template <class T>
void finish(const AttentionFwd& f, Work& w, int64_t b, int64_t head, int64_t q0, int64_t count) {
  const Attention& a = f.in;
  const float unit = (a.softcap > 0 ? 1.f : a.scale) * kLog<Operand<T>>;
  float* lse = f.lse + (b * a.heads + head) * a.length + q0;
  for (int64_t i = 0; i < count; ++i) {
    const float shift = w.top[i] * unit;  // rounded, as the weights' exponents hold it
    lse[i] = w.total[i] == 0 ? -INFINITY : float(shift / kLogExact<Operand<T>> + log(double(w.total[i])));
  }
  for (int64_t i = 0; i < kQueries; ++i) w.total[i] = w.total[i] == 0 ? 1 : w.total[i];
  for (int64_t i = 0; i < kQueries; i += kLanes) {
    const Vec total = load(w.total + i, Full{}), part = splat(1.f) / total;
    for (float* at = w.sums + i; at < w.sums + a.width * kQueries; at += kQueries) {
      // Where the result stays fp32, divided and not multiplied: one rounding.
      const Vec sum = load(at, Full{});
      store(at, kPack<Operand<T>> == 1 ? sum / total : sum * part, Full{});
    }
  }
  const int64_t row = a.heads * a.width;
  T* out = static_cast<T*>(f.out) + (b * a.length + q0) * row + head * a.width;
  store_turned(w.sums, 1.f, count, a.width, out, row);
}

template <class T, class E>
void one_tile(const AttentionFwd& f, Work& w, Rows<E> k, const E* v_turned, int64_t b, int64_t head, int64_t q0) {
  const Attention& a = f.in;
  const int64_t count = smaller(kQueries, a.length - q0), vecs = ceil_div(count, kLanes);
  find_scope(a, b, q0, count, w.scope);
  const Rows<T> q = head_rows<T>(a.q, a.strides, b, head);
  pack_across<E>(q[q0], q.stride, count, a.width, w.queries);
  for (int64_t i = 0; i < kQueries; ++i) w.top[i] = kNothing, w.total[i] = 0;
  bool started = false;
  for (int64_t tile = w.scope.first / kKeys; tile * kKeys < w.scope.last; ++tile) {
    const Keys keys(w.scope, tile);
    const Seen part = seen(w.scope, keys.first, keys.first + keys.count);
    if (part == Seen::kNone) continue;
    product<E>(keys.count, vecs, words<E>(a.width), k[keys.first], k.stride, w.queries, kQueries, w.scores, kQueries,
               kOverwrite);
    for (int64_t lane = 0; lane < vecs * kLanes; lane += kLanes) {
      if (part == Seen::kSome || a.softcap > 0) limit_scores<E>(a, w, keys, lane);
      weigh<E>(a, w, keys.count, lane);
    }
    const E* v = v_turned + tile * kKeys * a.width + (keys.first - keys.begin);
    product<E>(a.width, vecs, words<E>(keys.count), v, kKeys, w.weights, kQueries, w.sums, kQueries,
               Into{started, started ? w.fade : nullptr});
    started = true;
  }
  if (!started) std::memset(w.sums, 0, a.width * kQueries * sizeof(float));
  finish<T>(f, w, b, head, q0, count);
}

template <class T>
void forward(const AttentionFwd& f) {
  using E = Operand<T>;
  const Attention& a = f.in;
  const int64_t tiles = key_tiles(a), q_tiles = query_tiles(a), panel = kv_panel(a), kv = a.batch * a.kv_heads;
  const int64_t group = a.heads / a.kv_heads;
  float* turned = a.scratch;
  float* widened = turned + kv * panel;
  float* own = a.scratch + attention_shared(a);
  const int threads = attention_team(a);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < kv * tiles; ++i) {
      const int64_t head = i / tiles, k0 = i % tiles * kKeys, count = smaller(kKeys, a.keys - k0);
      const Rows<T> v = head_rows<T>(a.v, a.strides + 6, head / a.kv_heads, head % a.kv_heads);
      const Rows<T> k = head_rows<T>(a.k, a.strides + 3, head / a.kv_heads, head % a.kv_heads);
      pack_turned(v[k0], v.stride, count, a.width, reinterpret_cast<E*>(turned + head * panel) + k0 * a.width);
      if (sizeof(T) != sizeof(E)) widen_rows(k[k0], k.stride, count, a.width, widened + head * panel + k0 * a.width);
    }
#if defined(FUSELORA_TILES)
    const TileScope tile_scope;
#endif
    Work work(a, own + thread_index() * attention_each(a));
    // The last queries of a head see most: they come first, so that threads end together.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.batch * a.heads * q_tiles; ++i) {
      const int64_t b = i / q_tiles / a.heads, head = i / q_tiles % a.heads;
      const int64_t q0 = (q_tiles - 1 - i % q_tiles) * kQueries;
      const int64_t at = (b * a.kv_heads + head / group) * panel;
      const Rows<T> k = head_rows<T>(a.k, a.strides + 3, b, head / group);
      one_tile<T, E>(f, work, operand_rows(k, reinterpret_cast<E*>(widened + at), a.width),
                     reinterpret_cast<const E*>(turned + at), b, head, q0);
    }
  }
}

}  // namespace

void attention(const AttentionFwd& f) {
  if (f.in.dtype == FUSELORA_BF16) return forward<bf16>(f);
  if (f.in.dtype == FUSELORA_F16) return forward<fp16>(f);
  forward<float>(f);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
