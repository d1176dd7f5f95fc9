// Gated linear unit activation, forward and backward. Formulas: kernels/glu.py. One pass, every element by itself; threads
// share rows.
#include "cpu/kernels.h"
#include "cpu/vec_math.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

struct Activated {
  Vec value, slope;
};

struct Silu {
  static Activated at(Vec g) {
    const Vec s = logistic(g);
    return {g * s, s * fma(g, splat(1.f) - s, splat(1.f))};
  }
};

struct Gelu {
  static Activated at(Vec g) {
    const Normal n = normal(g);
    return {g * n.below, fma(g, n.density, n.below)};
  }
};

// s = (1 + tanh u) / 2 = 1 / (1 + e^-2u) with u = sqrt(2 / pi) (g + 0.044715 g^3): the first form has the smaller error
// near 0, the second keeps the lower tail. There 1 - s = e^-2u s for u > 0, where the difference would lose digits.
struct GeluTanh {
  static Activated at(Vec g) {
    const Vec linear = splat(0.797884561f), cubic = splat(0.0356774081f), square = g * g, half = splat(0.5f);
    const Vec u = g * fma(square, cubic, linear), size = magnitude(u);
    const Vec small = splat(kTanhSmall), half_tanh = half * tanh_small(u);
    const Vec e = exp(splat(-2.f) * u), tail = splat(1.f) / (splat(1.f) + e);
    const Vec s = select(size, small, half + half_tanh, tail);
    const Vec rest = select(size, small, half - half_tanh, select(splat(0.f), u, e * tail, splat(1.f) - tail));
    const Vec slope = g * fma(square, splat(6.f) * cubic, linear + linear);  // g d(2u)/dg
    return {g * s, s * fma(slope, rest, splat(1.f))};
  }
};

template <class T, class Act>
void forward(const Glu& a) {
  const int threads = team(a.rows * a.cols, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* h = static_cast<T*>(a.h) + row * a.cols;
    each(a.cols, [&](int64_t j, auto lanes) {
      store(h + j, Act::at(load(gate + j, lanes)).value * load(up + j, lanes), lanes);
    });
  }
}

template <class T, class Act>
void backward(const GluBwd& a) {
  const int threads = team(a.rows * a.cols, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* dh = static_cast<const T*>(a.dh) + row * a.dh_stride;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* dgate = static_cast<T*>(a.dgate) + row * a.d_stride;
    T* dup = static_cast<T*>(a.dup) + row * a.d_stride;
    T* h = a.h ? static_cast<T*>(a.h) + row * a.cols : nullptr;
    each(a.cols, [&](int64_t j, auto lanes) {
      const Vec d = load(dh + j, lanes), u = load(up + j, lanes);
      const Activated act = Act::at(load(gate + j, lanes));
      store(dup + j, d * act.value, lanes);
      store(dgate + j, d * u * act.slope, lanes);
      if (h) store(h + j, act.value * u, lanes);
    });
  }
}

template <class T>
void forward(const Glu& a) {
  if (a.act == FUSELORA_SILU) return forward<T, Silu>(a);
  if (a.act == FUSELORA_GELU) return forward<T, Gelu>(a);
  forward<T, GeluTanh>(a);
}

template <class T>
void backward(const GluBwd& a) {
  if (a.act == FUSELORA_SILU) return backward<T, Silu>(a);
  if (a.act == FUSELORA_GELU) return backward<T, Gelu>(a);
  backward<T, GeluTanh>(a);
}

}  // namespace

void glu(const Glu& a) {
  if (a.dtype == FUSELORA_BF16) return forward<bf16>(a);
  if (a.dtype == FUSELORA_F16) return forward<fp16>(a);
  forward<float>(a);
}

void glu_bwd(const GluBwd& a) {
  if (a.dtype == FUSELORA_BF16) return backward<bf16>(a);
  if (a.dtype == FUSELORA_F16) return backward<fp16>(a);
  backward<float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
