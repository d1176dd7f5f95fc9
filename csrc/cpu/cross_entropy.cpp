// Cross-entropy of rows of logits: loss, log-sum-exp, entropy, and the gradient, which may overwrite the logits. Formulas:
// kernels/cross_entropy.py and cross_entropy_rows.py. Up to three passes over a row, the later ones from cache: the maximum,
// the sums of e = exp(z - max), the gradient. Probabilities are e / sum(e), exact where one logit dominates; exp(z - lse)
// would carry the rounding of lse. Threads share rows.
#include "cpu/kernels.h"
#include "cpu/vec_math.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

// x, with `value` in the lanes beyond a short end.
static inline Vec padded(Vec x, Full, float) { return x; }
static inline Vec padded(Vec x, Tail tail, float value) {
  float lanes[kLanes];
  store(lanes, x, Full{});
  for (int i = tail.n; i < kLanes; ++i) lanes[i] = value;
  return load(lanes, Full{});
}

static inline float first(Vec x) {
  float lanes[kLanes];
  store(lanes, x, Full{});
  return lanes[0];
}

static inline float largest(Vec x) {
  float lanes[kLanes], top = -INFINITY;
  store(lanes, x, Full{});
  for (int i = 0; i < kLanes; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

// z = scale x or cap tanh(scale x / cap), and dz / dx up to the scale.
template <bool capped>
struct Transform {
  float scale, cap;
  Vec squashed(Vec scaled) const { return tanh(scaled / splat(cap)); }
  Vec logit(Vec scaled) const { return capped ? splat(cap) * squashed(scaled) : scaled; }
};

struct Sums {
  float exps, logits, surprise;  // of e, z, e (max - z)
};

template <class T, bool capped>
struct Row {
  const CrossEntropy& a;
  const T* x;
  Transform<capped> f;

  Vec scaled(int64_t j, Full lanes) const { return load(x + j, lanes) * splat(f.scale); }
  Vec scaled(int64_t j, Tail lanes) const { return load(x + j, lanes) * splat(f.scale); }

  float top() const {
    Vec tops[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    int64_t j = 0;
    for (; j + 4 * kLanes <= a.cols; j += 4 * kLanes)
      for (int i = 0; i < 4; ++i) tops[i] = maximum(tops[i], scaled(j + i * kLanes, Full{}));
    for (; j + kLanes <= a.cols; j += kLanes) tops[0] = maximum(tops[0], scaled(j, Full{}));
    if (j < a.cols) {
      const Tail lanes{int(a.cols - j)};
      tops[1] = maximum(tops[1], padded(scaled(j, lanes), lanes, -INFINITY));
    }
    // The transform is monotone, so one tanh will do.
    return first(f.logit(splat(largest(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]))))));
  }

  Sums sums(float top, bool extra) const {
    Sums s = {0, 0, 0};
    const Vec t = splat(top);
    s.exps = reduce(a.cols, [&](Vec acc, int64_t j, auto lanes) {
      return acc + padded(exp(f.logit(scaled(j, lanes)) - t), lanes, 0);
    });
    if (!extra) return s;
    s.logits = reduce(a.cols, [&](Vec acc, int64_t j, auto lanes) { return acc + f.logit(scaled(j, lanes)); });
    s.surprise = reduce(a.cols, [&](Vec acc, int64_t j, auto lanes) {
      const Vec below = f.logit(scaled(j, lanes)) - t;
      return acc - padded(below * exp(below), lanes, 0);
    });
    return s;
  }
};

// The gradient of one row: dx = ((e / sum) (weight + turn (level - z)) - uniform - [label] (1 - smoothing) factor) dz/dx,
// where turn = scale dentropy and level = log-sum-exp minus entropy.
struct Slope {
  float top, per_exp, turn, level, uniform;
};

template <class T, bool capped, bool turned>
void write_gradient(const Row<T, capped>& row, T* dx, const Slope& s, int64_t label, float label_part) {
  const Vec top = splat(s.top), per_exp = splat(s.per_exp), uniform = splat(s.uniform);
  const Vec turn = splat(s.turn), level = splat(s.level), one = splat(1.f);
  const auto gradient = [&](Vec scaled, Vec part) {
    const Vec squashed = capped ? row.f.squashed(scaled) : one;
    const Vec below = (capped ? splat(row.f.cap) * squashed : scaled) - top;
    const Vec weight = turned ? fma(turn, level - below, per_exp) : per_exp;
    const Vec dz = fma(exp(below), weight, splat(0.f) - uniform) - part;
    return capped ? dz * fma(splat(0.f) - squashed, squashed, one) : dz;
  };
  const Vec at_label = gradient(row.scaled(label, Tail{1}), splat(label_part));
  each(row.a.cols, [&](int64_t j, auto lanes) { store(dx + j, gradient(row.scaled(j, lanes), splat(0.f)), lanes); });
  store(dx + label, at_label, Tail{1});
}

template <class T, bool capped>
void process_row(const CrossEntropy& a, int64_t i) {
  T* dx = a.dx ? static_cast<T*>(a.dx) + i * a.dx_stride : nullptr;
  const int64_t label = a.labels[i];
  if (label == a.ignore_index) {
    a.loss[i] = a.lse[i] = 0;
    if (a.entropy) a.entropy[i] = 0;
    if (dx) std::memset(dx, 0, a.cols * sizeof(T));
    return;
  }
  const Row<T, capped> row = {a, static_cast<const T*>(a.x) + i * a.x_stride, {a.logit_scale, a.softcap}};
  const float dentropy = a.dentropy ? a.dentropy[i] : 0, smoothing = a.label_smoothing;
  const float top = row.top(), picked = first(row.f.logit(row.scaled(label, Tail{1})));
  const Sums sums = row.sums(top, smoothing != 0 || a.entropy || a.dentropy);
  const float log_sum = logf(sums.exps), lse = top + log_sum, surprise = sums.surprise / sums.exps;
  // top - picked is exact for a confident row, lse - picked is not.
  // Without smoothing a label at -inf has the loss inf, as stock, and not 0 * inf.
  const float smoothed = smoothing != 0 ? smoothing * (picked - sums.logits / float(a.cols)) : 0.f;
  a.loss[i] = (top - picked) + log_sum + smoothed + a.z_loss * lse * lse;
  a.lse[i] = lse;
  if (a.entropy) a.entropy[i] = surprise + log_sum;
  if (!dx) return;
  const float factor = a.upstream[i] * a.logit_scale, turn = dentropy * a.logit_scale / sums.exps;
  const Slope s = {top, factor * (1 + 2 * a.z_loss * lse) / sums.exps, turn, -surprise,
                   factor * (smoothing / float(a.cols))};
  const float label_part = factor * (1 - smoothing);
  if (a.dentropy) return write_gradient<T, capped, true>(row, dx, s, label, label_part);
  write_gradient<T, capped, false>(row, dx, s, label, label_part);
}

template <class T, bool capped>
void process(const CrossEntropy& a) {
  const int threads = team(a.rows * a.cols, a.threads);
  // Ignored rows cost nothing and often lie together, so rows are dealt out as threads get free.
  const int64_t chunk = 1 + kParallelElements / 8 / a.cols;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, chunk)
  for (int64_t i = 0; i < a.rows; ++i) process_row<T, capped>(a, i);
}

template <class T>
void process(const CrossEntropy& a) {
  if (a.softcap != 0) return process<T, true>(a);
  process<T, false>(a);
}

}  // namespace

void cross_entropy(const CrossEntropy& a) {
  if (a.dtype == FUSELORA_BF16) return process<bf16>(a);
  if (a.dtype == FUSELORA_F16) return process<fp16>(a);
  process<float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
