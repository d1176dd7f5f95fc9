// Attention backward. Formulas: kernels/attention.py. Five products on tiles whose lanes are queries:
//   S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
// A task walks over the queries of one head and over its chunk of the key tiles, which it alone adds to; tasks of
// several chunks give shares of dQ, summed in order. So there are no atomics, and sums don't depend on the threads.
#include "cpu/attention_scope.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

// What all threads share, `panel` floats for each (batch, kv head): K^T as a left operand, K and V widened, the sums.
struct Shared {
  int64_t panel;
  float *k_turned, *k, *v, *dk, *dv;
  float* dq;       // [batch, kv head, chunk, query tile of share_tiles, padded width, kQueries]
  float* queries;  // [batch, kv head, query tile of share_tiles, packed_queries], of one head of each group
  explicit Shared(const Attention& a)
      : panel(kv_panel(a)),
        k_turned(a.scratch),
        k(k_turned + a.batch * a.kv_heads * panel),
        v(k + a.batch * a.kv_heads * panel),
        dk(v + a.batch * a.kv_heads * panel),
        dv(dk + a.batch * a.kv_heads * panel),
        dq(dv + a.batch * a.kv_heads * panel),
        queries(dq + dq_shares(a)) {}
};

// A tile of queries. q and dout are packed twice, summing over channels and over queries.
struct Queries {
  float *q_across, *dout_across, *q_along, *dout_along, *lse, *delta;
  Queries(const Attention& a, float* p)
      : q_across(p),
        dout_across(q_across + padded_width(a) * kQueries),
        q_along(dout_across + padded_width(a) * kQueries),
        dout_along(q_along + padded_width(a) * kQueries),
        lse(dout_along + padded_width(a) * kQueries),
        delta(lse + kQueries) {}
};

// What a thread works in.
template <class E>
struct Work {
  float* queries;
  float *dq, *scores, *dweights, *dscores;
  E *weights, *dscores_rows;
  Scope scope;
  Work(const Attention& a, float* p)
      : queries(p),
        dq(queries + packed_queries(a)),
        scores(dq + padded_width(a) * kQueries),
        dweights(scores + kKeys * kQueries),
        dscores(dweights + kKeys * kQueries),
        weights(reinterpret_cast<E*>(dscores + kKeys * kQueries)),
        dscores_rows(kPack<E> == 1 ? reinterpret_cast<E*>(dscores)
                                   : reinterpret_cast<E*>(dscores + 2 * kKeys * kQueries)) {}
};

// x . y of sixteen queries, [depth words, kQueries] each, summed as dP^T is: where a query sees one key, so that its
// output is that key's value, dP - delta is exactly zero, as in stock.
template <class E>
Vec dots(int64_t depth, const float* x, const float* y) {
  Vec sum = splat(0.f);
  for (int64_t first = 0; first < depth; first += kSegment<E>) {
    Vec part = splat(0.f);
    for (int64_t k = first; k < smaller(first + kSegment<E>, depth); ++k)
      part = dot<E>(part, load(x + k * kQueries, Full{}), load(y + k * kQueries, Full{}));
    sum = first ? sum + part : part;
  }
  return sum;
}

#if defined(FUSELORA_TILES)
// As tiles sum: of sixteen words the first and the second products apart, from zero.
template <>
Vec dots<bf16>(int64_t depth, const float* x, const float* y) {
  const auto first_of = [](__m512i words) { return Vec{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))}; };
  const auto second_of = [](__m512i words) {
    return Vec{_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int32_t(0xffff0000))))};
  };
  Vec sum = splat(0.f);
  for (int64_t step = 0; step < depth; step += kTilePairs) {
    Vec even = splat(0.f), odd = even;
    for (int64_t k = step; k < smaller(step + kTilePairs, depth); ++k) {
      const __m512i left = _mm512_loadu_si512(x + k * kQueries), right = _mm512_loadu_si512(y + k * kQueries);
      even = fma(first_of(left), first_of(right), even);
      odd = fma(second_of(left), second_of(right), odd);
    }
    sum = sum + (even + odd);
  }
  return sum;
}
#endif

template <class T, class E>
void take_queries(const AttentionBwd& f, const Queries& to, int64_t b, int64_t head, int64_t q0) {
  const Attention& a = f.in;
  const int64_t count = smaller(kQueries, a.length - q0), padded = padded_width(a);
  const int64_t row = a.heads * a.width, at = (b * a.length + q0) * row + head * a.width;
  const Rows<T> q = head_rows<T>(a.q, a.strides, b, head);
  const T *dout = static_cast<const T*>(f.dout) + at, *out = static_cast<const T*>(f.out) + at;
  const float* lse = f.lse + (b * a.heads + head) * a.length + q0;
  pack_across<E>(q[q0], q.stride, count, a.width, to.q_across);
  pack_across<E>(dout, row, count, a.width, to.dout_across);
  pack_across<E>(out, row, count, a.width, to.q_along);
  for (int64_t lane = 0; lane < kQueries; lane += kLanes) {
    const int64_t depth = lane < count ? words<E>(a.width) : 0;
    store(to.delta + lane, dots<E>(depth, to.q_along + lane, to.dout_across + lane), Full{});
  }
  for (int64_t i = 0; i < kQueries; ++i) to.lse[i] = i < count ? lse[i] : 0;
  pack_along<E>(q[q0], q.stride, count, a.width, padded, to.q_along);
  pack_along<E>(dout, row, count, a.width, padded, to.dout_along);
}

// Keys whose scores are taken at a time: S^T and dP^T of them stay in the L1 cache until P^T and dS^T are made.
template <class E>
constexpr int64_t kStrip = 2 * kBlockRows;
#if defined(FUSELORA_TILES)
template <>
constexpr int64_t kStrip<bf16> = kTileBlockRows;
#endif

// P^T and dS^T of sixteen queries and `count` keys from row `first` of the tile on, from S^T and dP^T.
template <class E, bool masked, bool capped>
void differentiate(const Attention& a, Work<E>& w, const Queries& queries, int64_t key, int64_t first, int64_t count,
                   int64_t lane) {
  const Vec unit = splat((capped ? a.softcap : a.scale) * kLog<E>), inner = splat(capped ? a.scale / a.softcap : 0.f);
  const Vec offset = load(queries.lse + lane, Full{}) * splat(-kLog<E>);
  const Vec delta = load(queries.delta + lane, Full{});
  const auto one = [&](int64_t row, Vec* p, Vec* ds) {
    const int64_t at = row * kQueries + lane;
    Vec s = load(w.scores + at, Full{});
    if (capped) s = tanh(s * inner);
    *p = power_of<E>(s, unit, offset);
    if (masked) *p = visible(w.scope, lane, key + row, *p, splat(0.f));
    *ds = *p * (load(w.dweights + at, Full{}) - delta);
    if (capped) *ds = *ds * (splat(1.f) - s * s);
  };
  // An odd last key gets a neighbour of zeros, which the products don't read or multiply by the zeros behind K^T's end.
  for (int64_t row = 0; row < count; row += 2) {
    Vec p[2] = {splat(0.f), splat(0.f)}, ds[2] = {splat(0.f), splat(0.f)};
    one(row, &p[0], &ds[0]);
    if (row + 1 < count) one(row + 1, &p[1], &ds[1]);
    const int64_t at = (first + row) * kQueries + lane;
    store_pair(w.weights + at, kQueries, p[0], p[1]);
    if (kPack<E> > 1) store_pair(w.dscores_rows + at, kQueries, ds[0], ds[1]);
    store_rows<E>(w.dscores, first + row, lane, ds[0], ds[1]);
  }
}

// Left operands of a kv head, and its sums.
template <class E>
struct Head {
  Rows<E> k, v;
  const E* k_turned;
  float *dk, *dv;
};

// One query tile against the key tiles of a chunk, to dq: its dQ^T, before scaling.
template <class E>
void one_tile(const Attention& a, Work<E>& w, const Head<E>& kv, const Queries& queries, int64_t b, int64_t q0,
              int64_t chunk, float* dq) {
  const int64_t count = smaller(kQueries, a.length - q0), vecs = ceil_div(count, kLanes), chunks = key_chunks(a);
  const int64_t padded = padded_width(a), depth = words<E>(a.width), width = padded / kLanes;
  find_scope(a, b, q0, count, w.scope);
  bool started = false;
  for (int64_t tile = w.scope.first / kKeys; tile * kKeys < w.scope.last; ++tile) {
    if (tile % chunks != chunk) continue;
    const Keys keys(w.scope, tile);
    const Seen part = seen(w.scope, keys.first, keys.first + keys.count);
    if (part == Seen::kNone) continue;
    const auto weigh = a.softcap > 0             ? differentiate<E, true, true>
                       : part == Seen::kSome ? differentiate<E, true, false>
                                             : differentiate<E, false, false>;
    for (int64_t row = 0; row < keys.count; row += kStrip<E>) {
      const int64_t some = smaller(kStrip<E>, keys.count - row), key = keys.first + row;
      product<E>(some, vecs, depth, kv.k[key], kv.k.stride, queries.q_across, kQueries, w.scores, kQueries, kOverwrite);
      product<E>(some, vecs, depth, kv.v[key], kv.v.stride, queries.dout_across, kQueries, w.dweights, kQueries,
                 kOverwrite);
      for (int64_t lane = 0; lane < vecs * kLanes; lane += kLanes) weigh(a, w, queries, key, row, some, lane);
    }
    const int64_t sum = words<E>(vecs * kLanes), at = keys.first * padded;
    product<E>(keys.count, width, sum, w.weights, kQueries, queries.dout_along, padded, kv.dv + at, padded, kAdd);
    product<E>(keys.count, width, sum, w.dscores_rows, kQueries, queries.q_along, padded, kv.dk + at, padded, kAdd);
    const E* k_turned = kv.k_turned + tile * kKeys * a.width + (keys.first - keys.begin);
    product<E>(a.width, vecs, words<E>(keys.count), k_turned, kKeys, w.dscores, kQueries, dq, kQueries,
               started ? kAdd : kOverwrite);
    started = true;
  }
  if (!started) std::memset(dq, 0, padded * kQueries * sizeof(float));
}

template <class T>
T* query_rows(void* x, const Attention& a, int64_t b, int64_t head, int64_t q0) {
  return static_cast<T*>(x) + ((b * a.length + q0) * a.heads + head) * a.width;
}

// Query tiles [first, last) of one head against one chunk of its keys.
template <class T, class E>
void one_head(const AttentionBwd& f, const Shared& shared, Work<E>& w, int64_t kv, int64_t group_head, int64_t chunk,
              int64_t first, int64_t last) {
  const Attention& a = f.in;
  const int64_t b = kv / a.kv_heads, kv_head = kv % a.kv_heads, head = kv_head * (a.heads / a.kv_heads) + group_head;
  const int64_t at = kv * shared.panel, chunks = key_chunks(a), share = padded_width(a) * kQueries;
  const Rows<T> k = head_rows<T>(a.k, a.strides + 3, b, kv_head), v = head_rows<T>(a.v, a.strides + 6, b, kv_head);
  const Head<E> operands{operand_rows(k, reinterpret_cast<E*>(shared.k + at), a.width),
                         operand_rows(v, reinterpret_cast<E*>(shared.v + at), a.width),
                         reinterpret_cast<const E*>(shared.k_turned + at), shared.dk + at, shared.dv + at};
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t q0 = tile * kQueries, part = (kv * chunks + chunk) * share_tiles(a) + tile - first;
    if (chunks > 1) {
      const Queries queries(a, shared.queries + (kv * share_tiles(a) + tile - first) * packed_queries(a));
      one_tile(a, w, operands, queries, b, q0, chunk, shared.dq + part * share);
    } else {
      const Queries queries(a, w.queries);
      take_queries<T, E>(f, queries, b, head, q0);
      one_tile(a, w, operands, queries, b, q0, chunk, w.dq);
      store_turned(w.dq, a.scale, smaller(kQueries, a.length - q0), a.width, query_rows<T>(f.dq, a, b, head, q0),
                   a.heads * a.width);
    }
  }
}

// dQ of one tile, the `part`-th of those that have shares, from its shares, summed in the order of chunks.
template <class T>
void add_shares(const AttentionBwd& f, const Shared& shared, int64_t kv, int64_t group_head, int64_t tile,
                int64_t part) {
  const Attention& a = f.in;
  const int64_t b = kv / a.kv_heads, head = kv % a.kv_heads * (a.heads / a.kv_heads) + group_head, q0 = tile * kQueries;
  const int64_t share = padded_width(a) * kQueries, chunks = key_chunks(a), step = share_tiles(a) * share;
  float* first = shared.dq + kv * chunks * step + part * share;
  for (int64_t i = 0; i < share; i += kLanes) {
    Vec sum = load(first + i, Full{});
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum = sum + load(first + chunk * step + i, Full{});
    store(first + i, sum, Full{});
  }
  store_turned(first, a.scale, smaller(kQueries, a.length - q0), a.width, query_rows<T>(f.dq, a, b, head, q0),
               a.heads * a.width);
}

// Packs the keys of one tile, and clears their sums.
template <class T>
void prepare(const Attention& a, const Shared& shared, int64_t kv, int64_t k0) {
  using E = Operand<T>;
  const int64_t count = smaller(kKeys, a.keys - k0), padded = padded_width(a), at = kv * shared.panel;
  const Rows<T> k = head_rows<T>(a.k, a.strides + 3, kv / a.kv_heads, kv % a.kv_heads);
  const Rows<T> v = head_rows<T>(a.v, a.strides + 6, kv / a.kv_heads, kv % a.kv_heads);
  pack_turned(k[k0], k.stride, count, a.width, reinterpret_cast<E*>(shared.k_turned + at) + k0 * a.width);
  if (sizeof(T) != sizeof(E)) {
    widen_rows(k[k0], k.stride, count, a.width, shared.k + at + k0 * a.width);
    widen_rows(v[k0], v.stride, count, a.width, shared.v + at + k0 * a.width);
  }
  std::memset(shared.dk + at + k0 * padded, 0, kKeys * padded * sizeof(float));
  std::memset(shared.dv + at + k0 * padded, 0, kKeys * padded * sizeof(float));
}

template <class T>
void store_key(const AttentionBwd& f, const Shared& shared, int64_t kv, int64_t key) {
  const Attention& a = f.in;
  const int64_t from = kv * shared.panel + key * padded_width(a);
  const int64_t to = ((kv / a.kv_heads * a.keys + key) * a.kv_heads + kv % a.kv_heads) * a.width;
  const Vec scale = splat(a.scale);
  each(a.width, [&](int64_t j, auto lanes) {
    store(static_cast<T*>(f.dk) + to + j, load(shared.dk + from + j, lanes) * scale, lanes);
    store(static_cast<T*>(f.dv) + to + j, load(shared.dv + from + j, lanes), lanes);
  });
}

template <class T>
void backward(const AttentionBwd& f) {
  using E = Operand<T>;
  const Attention& a = f.in;
  const Shared shared(a);
  const int64_t kv = a.batch * a.kv_heads, chunks = key_chunks(a), group = a.heads / a.kv_heads, tiles = key_tiles(a);
  // Heads of a group share dK and dV. With one chunk they follow each other within a task.
  const int64_t rounds = chunks == 1 ? 1 : group, heads = group / rounds;
  const int64_t blocks = a.length == 0 ? 0 : ceil_div(query_tiles(a), share_tiles(a));
  const int threads = attention_team(a);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#if defined(FUSELORA_TILES)
    const TileScope tile_scope;
#endif
    Work<E> work(a, a.scratch + attention_bwd_shared(a) + thread_index() * attention_bwd_each(a));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < kv * tiles; ++i) prepare<T>(a, shared, i / tiles, i % tiles * kKeys);
    for (int64_t part = 0; part < rounds * blocks; ++part) {
      const int64_t round = part / blocks, first = part % blocks * share_tiles(a);
      const int64_t last = smaller(query_tiles(a), first + share_tiles(a)), some = last - first;
      if (chunks > 1) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < kv * some; ++i) {
          const int64_t head = i / some % a.kv_heads * group + round, q0 = (first + i % some) * kQueries;
          const Queries queries(a, shared.queries + (i / some * share_tiles(a) + i % some) * packed_queries(a));
          take_queries<T, E>(f, queries, i / some / a.kv_heads, head, q0);
        }
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < kv * chunks; ++i)
        for (int64_t g = round * heads; g < (round + 1) * heads; ++g)
          one_head<T>(f, shared, work, i / chunks, g, i % chunks, first, last);
      if (chunks == 1) continue;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < kv * some; ++i)
        add_shares<T>(f, shared, i / some, round, first + i % some, i % some);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < kv * a.keys; ++i) store_key<T>(f, shared, i / a.keys, i % a.keys);
  }
}

}  // namespace

void attention_bwd(const AttentionBwd& f) {
  if (f.in.dtype == FUSELORA_BF16) return backward<bf16>(f);
  if (f.in.dtype == FUSELORA_F16) return backward<fp16>(f);
  backward<float>(f);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
