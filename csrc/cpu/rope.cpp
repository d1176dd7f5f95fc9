// Rotary position embedding of q and k. Formulas: kernels/rope.py. A step handles sixteen channels (half-split: sixteen
// pairs) of every head of one token, so that cos and sin are widened once per token; threads share tokens.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

#if defined(__AVX512F__)
static inline Vec swap_pairs(Vec x) { return {_mm512_permute_ps(x.v, 0xb1)}; }
#elif defined(__AVX2__)
static inline Vec swap_pairs(Vec x) { return {_mm256_permute_ps(x.lo, 0xb1), _mm256_permute_ps(x.hi, 0xb1)}; }
#else
static inline Vec swap_pairs(const Vec& x) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = x.v[i ^ 1];
  return r;
}
#endif

// One of q or k at one token.
template <class T>
struct Heads {
  const T* x;
  T* y;
  int64_t count, x_stride, y_stride;
};

// Pairs (j, j + half). Forward y_a = x_a cos_a - x_b sin_a, y_b = x_b cos_b + x_a sin_b; the adjoint exchanges the sines
// and their signs.
template <class T, class C>
void rotate_halves(const Heads<T> (&both)[2], const C* cos, const C* sin, int64_t half, bool adjoint) {
  each(half, [&](int64_t j, auto lanes) {
    const Vec cos_a = load(cos + j, lanes), cos_b = load(cos + half + j, lanes);
    const Vec sin_a = load(sin + j, lanes), sin_b = load(sin + half + j, lanes), zero = splat(0);
    const Vec to_a = adjoint ? sin_b : zero - sin_a, to_b = adjoint ? zero - sin_a : sin_b;
    for (const Heads<T>& heads : both) {
      for (int64_t head = 0; head < heads.count; ++head) {
        const T* x = heads.x + head * heads.x_stride + j;
        T* y = heads.y + head * heads.y_stride + j;
        const Vec a = load(x, lanes), b = load(x + half, lanes);
        store(y, fma(b, to_a, a * cos_a), lanes);
        store(y + half, fma(a, to_b, b * cos_b), lanes);
      }
    }
  });
}

// Pairs (2i, 2i + 1): y = x cos + swap(x) factor, factor = (-sin_a, sin_b), and its swap in the adjoint.
template <class T, class C>
void rotate_neighbours(const Heads<T> (&both)[2], const C* cos, const C* sin, int64_t rotary, bool adjoint) {
  constexpr float signs[kLanes] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
  const Vec sign = load(signs, Full{});
  each(rotary, [&](int64_t j, auto lanes) {
    const Vec along = load(cos + j, lanes), forward = load(sin + j, lanes) * sign;
    const Vec across = adjoint ? swap_pairs(forward) : forward;
    for (const Heads<T>& heads : both) {
      for (int64_t head = 0; head < heads.count; ++head) {
        const Vec x = load(heads.x + head * heads.x_stride + j, lanes);
        store(heads.y + head * heads.y_stride + j, fma(swap_pairs(x), across, x * along), lanes);
      }
    }
  });
}

template <class T>
void pass_through(const Heads<T> (&both)[2], int64_t rotary, int64_t width) {
  if (rotary == width) return;
  for (const Heads<T>& heads : both)
    for (int64_t head = 0; head < heads.count; ++head)
      std::memcpy(heads.y + head * heads.y_stride + rotary, heads.x + head * heads.x_stride + rotary,
                  (width - rotary) * sizeof(T));
}

template <class T, class C>
void rotate(const Rope& a) {
  const int64_t tokens = a.batch * a.length;
  const int threads = team(tokens * (a.heads_q + a.heads_k) * a.width, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t b = token / a.length, s = token % a.length;
    const auto heads = [&](void* y, const void* x, int64_t count, const int64_t* strides) {
      return Heads<T>{static_cast<const T*>(x) + b * strides[0] + s * strides[1],
                      static_cast<T*>(y) + token * count * a.width, count, strides[2], a.width};
    };
    const Heads<T> both[2] = {heads(a.y_q, a.q, a.heads_q, a.strides), heads(a.y_k, a.k, a.heads_k, a.strides + 3)};
    const int64_t row = b * a.table_batch_stride + s * a.rotary;
    const C* cos = static_cast<const C*>(a.cos) + row;
    const C* sin = static_cast<const C*>(a.sin) + row;
    if (a.interleaved) {
      rotate_neighbours(both, cos, sin, a.rotary, a.adjoint);
    } else {
      rotate_halves(both, cos, sin, a.rotary / 2, a.adjoint);
    }
    pass_through(both, a.rotary, a.width);
  }
}

template <class T>
void rotate(const Rope& a) {
  if (a.table_dtype == FUSELORA_BF16) return rotate<T, bf16>(a);
  if (a.table_dtype == FUSELORA_F16) return rotate<T, fp16>(a);
  rotate<T, float>(a);
}

}  // namespace

void rope(const Rope& a) {
  if (a.dtype == FUSELORA_BF16) return rotate<bf16>(a);
  if (a.dtype == FUSELORA_F16) return rotate<fp16>(a);
  rotate<float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
