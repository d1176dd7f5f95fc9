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
  float* dq;  // [batch, kv head, chunk, query tile, padded width, kQueries]
  explicit Shared(const Attention& a)
      : panel(kv_panel(a)),
        k_turned(a.scratch),
        k(k_turned + a.batch * a.kv_heads * panel),
        v(k + a.batch * a.kv_heads * panel),
        dk(v + a.batch * a.kv_heads * panel),
        dv(dk + a.batch * a.kv_heads * panel),
        dq(dv + a.batch * a.kv_heads * panel) {}
};

// What a thread works in. Names as above; q and dout are packed twice, summing over channels and over queries.
template <class E>
struct Work {
  float *q_across, *dout_across, *q_along, *dout_along, *dq;
  float *scores, *dweights, *dscores;
  E *weights, *dscores_rows;
  float *lse, *delta;
  Scope scope;
  Work(const Attention& a, float* p)
      : q_across(p),
        dout_across(q_across + padded_width(a) * kQueries),
        q_along(dout_across + padded_width(a) * kQueries),
        dout_along(q_along + padded_width(a) * kQueries),
        dq(dout_along + padded_width(a) * kQueries),
        scores(dq + padded_width(a) * kQueries),
        dweights(scores + kKeys * kQueries),
        dscores(dweights + kKeys * kQueries),
        weights(reinterpret_cast<E*>(dscores + kKeys * kQueries)),
        dscores_rows(kPack<E> == 1 ? reinterpret_cast<E*>(dscores)
                                   : reinterpret_cast<E*>(dscores + 2 * kKeys * kQueries)),
        lse(dscores + 3 * kKeys * kQueries),
        delta(lse + kQueries) {}
};

template <class T, class E>
void take_queries(const AttentionBwd& f, Work<E>& w, int64_t b, int64_t head, int64_t q0, int64_t count) {
  const Attention& a = f.in;
  const int64_t padded = padded_width(a), row = a.heads * a.width, at = (b * a.length + q0) * row + head * a.width;
  const Rows<T> q = head_rows<T>(a.q, a.strides, b, head);
  const T *dout = static_cast<const T*>(f.dout) + at, *out = static_cast<const T*>(f.out) + at;
  pack_across<E>(q[q0], q.stride, count, a.width, w.q_across);
  pack_across<E>(dout, row, count, a.width, w.dout_across);
  pack_along<E>(q[q0], q.stride, count, a.width, padded, w.q_along);
  pack_along<E>(dout, row, count, a.width, padded, w.dout_along);
  const float* lse = f.lse + (b * a.heads + head) * a.length + q0;
  for (int64_t i = 0; i < kQueries; ++i) {
    w.lse[i] = i < count ? lse[i] : 0;
    w.delta[i] = i >= count ? 0 : reduce(a.width, [&](Vec sum, int64_t j, auto lanes) {
      return fma(load(dout + i * row + j, lanes), load(out + i * row + j, lanes), sum);
    });
  }
}

// P^T and dS^T of sixteen queries, from S^T and dP^T.
template <class E, bool masked, bool capped>
void differentiate(const Attention& a, Work<E>& w, const Keys& keys, int64_t lane) {
  const Vec unit = splat((capped ? a.softcap : a.scale) * kLog<E>), inner = splat(capped ? a.scale / a.softcap : 0.f);
  const Vec offset = load(w.lse + lane, Full{}) * splat(-kLog<E>), delta = load(w.delta + lane, Full{});
  const auto one = [&](int64_t row, Vec* p, Vec* ds) {
    const int64_t at = row * kQueries + lane;
    Vec s = load(w.scores + at, Full{});
    if (capped) s = tanh(s * inner);
    *p = power_of<E>(s, unit, offset);
    if (masked) *p = visible(w.scope, lane, keys.first + row, *p, splat(0.f));
    *ds = *p * (load(w.dweights + at, Full{}) - delta);
    if (capped) *ds = *ds * (splat(1.f) - s * s);
    store_elements(w.weights + at, *p);
    if (kPack<E> > 1) store_elements(w.dscores_rows + at, *ds);
  };
  for (int64_t row = 0; row < keys.count; row += 2) {
    Vec p, even, odd = splat(0.f);
    one(row, &p, &even);
    if (row + 1 < keys.count) one(row + 1, &p, &odd);
    store_rows<E>(w.dscores, row, lane, even, odd);
  }
}

template <class E>
void differentiate(const Attention& a, Work<E>& w, const Keys& keys, int64_t lane, bool masked) {
  if (a.softcap > 0) return differentiate<E, true, true>(a, w, keys, lane);
  if (masked) return differentiate<E, true, false>(a, w, keys, lane);
  differentiate<E, false, false>(a, w, keys, lane);
}

// Left operands of a kv head, and its sums.
template <class E>
struct Head {
  Rows<E> k, v;
  const E* k_turned;
  float *dk, *dv;
};

// One query tile against the key tiles of a chunk; w.dq is written if any of them is seen, which is the result.
template <class T, class E>
bool one_tile(const AttentionBwd& f, Work<E>& w, const Head<E>& kv, int64_t b, int64_t head, int64_t q0,
              int64_t chunk) {
  const Attention& a = f.in;
  const int64_t count = smaller(kQueries, a.length - q0), vecs = ceil_div(count, kLanes), chunks = key_chunks(a);
  const int64_t padded = padded_width(a), depth = words<E>(a.width), width = padded / kLanes;
  find_scope(a, b, q0, count, w.scope);
  bool started = false;
  for (int64_t tile = w.scope.first / kKeys; tile * kKeys < w.scope.last; ++tile) {
    if (tile % chunks != chunk) continue;
    const Keys keys(w.scope, tile);
    const Seen part = seen(w.scope, keys.first, keys.first + keys.count);
    if (part == Seen::kNone) continue;
    if (!started) take_queries<T>(f, w, b, head, q0, count);
    product<E>(keys.count, vecs, depth, kv.k[keys.first], kv.k.stride, w.q_across, kQueries, w.scores, kQueries,
               kOverwrite);
    product<E>(keys.count, vecs, depth, kv.v[keys.first], kv.v.stride, w.dout_across, kQueries, w.dweights, kQueries,
               kOverwrite);
    for (int64_t lane = 0; lane < vecs * kLanes; lane += kLanes) differentiate(a, w, keys, lane, part == Seen::kSome);
    const int64_t queries = words<E>(vecs * kLanes), at = keys.first * padded;
    product<E>(keys.count, width, queries, w.weights, kQueries, w.dout_along, padded, kv.dv + at, padded, kAdd);
    product<E>(keys.count, width, queries, w.dscores_rows, kQueries, w.q_along, padded, kv.dk + at, padded, kAdd);
    const E* k_turned = kv.k_turned + tile * kKeys * a.width + (keys.first - keys.begin);
    product<E>(a.width, vecs, words<E>(keys.count), k_turned, kKeys, w.dscores, kQueries, w.dq, kQueries,
               started ? kAdd : kOverwrite);
    started = true;
  }
  return started;
}

template <class T>
T* query_rows(void* x, const Attention& a, int64_t b, int64_t head, int64_t q0) {
  return static_cast<T*>(x) + ((b * a.length + q0) * a.heads + head) * a.width;
}

// One head's queries against one chunk of its keys.
template <class T, class E>
void one_head(const AttentionBwd& f, const Shared& shared, Work<E>& w, int64_t kv, int64_t group_head, int64_t chunk) {
  const Attention& a = f.in;
  const int64_t b = kv / a.kv_heads, kv_head = kv % a.kv_heads, head = kv_head * (a.heads / a.kv_heads) + group_head;
  const int64_t at = kv * shared.panel, chunks = key_chunks(a), share = padded_width(a) * kQueries;
  const Rows<T> k = head_rows<T>(a.k, a.strides + 3, b, kv_head), v = head_rows<T>(a.v, a.strides + 6, b, kv_head);
  const Head<E> operands{operand_rows(k, reinterpret_cast<E*>(shared.k + at), a.width),
                         operand_rows(v, reinterpret_cast<E*>(shared.v + at), a.width),
                         reinterpret_cast<const E*>(shared.k_turned + at), shared.dk + at, shared.dv + at};
  for (int64_t tile = 0; tile < query_tiles(a); ++tile) {
    const int64_t q0 = tile * kQueries;
    if (!one_tile<T>(f, w, operands, b, head, q0, chunk)) std::memset(w.dq, 0, share * sizeof(float));
    if (chunks == 1) {
      store_turned(w.dq, a.scale, smaller(kQueries, a.length - q0), a.width, query_rows<T>(f.dq, a, b, head, q0),
                   a.heads * a.width);
    } else {
      std::memcpy(shared.dq + ((kv * chunks + chunk) * query_tiles(a) + tile) * share, w.dq, share * sizeof(float));
    }
  }
}

// dQ of one tile from its shares, summed in the order of chunks.
template <class T>
void add_shares(const AttentionBwd& f, const Shared& shared, int64_t kv, int64_t group_head, int64_t tile) {
  const Attention& a = f.in;
  const int64_t b = kv / a.kv_heads, head = kv % a.kv_heads * (a.heads / a.kv_heads) + group_head, q0 = tile * kQueries;
  const int64_t share = padded_width(a) * kQueries, chunks = key_chunks(a), step = query_tiles(a) * share;
  float* first = shared.dq + (kv * chunks * query_tiles(a) + tile) * share;
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < share; i += kLanes)
      store(first + i, load(first + i, Full{}) + load(first + chunk * step + i, Full{}), Full{});
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
  const int threads = attention_team(a);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Work<E> work(a, a.scratch + attention_bwd_shared(a) + thread_index() * attention_bwd_each(a));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < kv * tiles; ++i) prepare<T>(a, shared, i / tiles, i % tiles * kKeys);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < kv * chunks; ++i)
        for (int64_t g = round * heads; g < (round + 1) * heads; ++g)
          one_head<T>(f, shared, work, i / chunks, g, i % chunks);
      if (chunks == 1) continue;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < kv * query_tiles(a); ++i)
        add_shares<T>(f, shared, i / query_tiles(a), round, i % query_tiles(a));
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
