// AdamW over a list of tensors: the gradients' joint norm, then the update. Formulas: kernels/adamw.py. Blocks are a
// function of the sizes alone and their sums are added in order, so no thread count changes a bit.
#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "cpu/vec_math.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

struct Block {
  int64_t tensor, start, count;
};

// The tensor whose blocks include this one: the last whose first block isn't beyond it, so empty tensors are passed over.
Block block_at(const AdamW& a, int64_t block) {
  int64_t low = 0, high = a.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.blocks[middle] <= block ? low : high) = middle;
  }
  const int64_t start = (block - a.blocks[low]) * kAdamWBlock, rest = a.sizes[low] - start;
  return {low, start, rest < kAdamWBlock ? rest : kAdamWBlock};
}

template <class T>
float squares(const AdamW& a, const Block& b) {
  const T* grad = static_cast<const T*>(a.grads[b.tensor]) + b.start;
  const Vec scale = splat(a.inv_scale);
  return reduce(b.count, [&](Vec acc, int64_t j, auto lanes) {
    const Vec g = load(grad + j, lanes) * scale;
    return fma(g, g, acc);
  });
}

// What all elements share, computed in fp64: 1 - beta2^t cancels digits.
struct Factors {
  double rate;       // 1 / (1 - beta1^t)
  float clip;        // with inv_scale
  float correction;  // 1 / sqrt(1 - beta2^t)
};

Factors factors(const AdamW& a, float norm) {
  constexpr double clip_epsilon = 1e-6;
  const double t = double(a.steps[0]) + 1, clip = a.max_norm / (double(norm) + clip_epsilon);
  return {1 / (1 - pow(a.beta1, t)), float((clip < 1 ? clip : 1) * double(a.inv_scale)),
          float(1 / sqrt(1 - pow(a.beta2, t)))};
}

template <class T, class Low>
void update(const AdamW& a, const Factors& f, const Block& b) {
  const int64_t t = b.tensor, at = a.offsets[t] + b.start;
  const T* grad = static_cast<const T*>(a.grads[t]) + b.start;
  T* param = static_cast<T*>(a.params[t]) + b.start;
  T* exp_avg = static_cast<T*>(a.exp_avg) + at;
  T* exp_avg_sq = static_cast<T*>(a.exp_avg_sq) + at;
  Low* low = a.low ? static_cast<Low*>(a.low[t]) + b.start : nullptr;
  const Vec clip = splat(f.clip), correction = splat(f.correction), eps = splat(float(a.eps));
  const Vec rest1 = splat(float(1 - a.beta1)), rest2 = splat(float(1 - a.beta2)), beta2 = splat(float(a.beta2));
  const Vec rate = splat(float(a.lrs[t] * f.rate)), decay = splat(float(a.lrs[t] * a.decays[t]));
  each(b.count, [&](int64_t j, auto lanes) {
    const Vec g = load(grad + j, lanes) * clip, old_m = load(exp_avg + j, lanes), p = load(param + j, lanes);
    const Vec m = fma(rest1, g - old_m, old_m), v = fma(rest2 * g, g, beta2 * load(exp_avg_sq + j, lanes));
    const Vec step = rate * m / fma(square_root(v), correction, eps);
    const Vec moved = p - fma(decay, p, step);
    store(exp_avg + j, m, lanes);
    store(exp_avg_sq + j, v, lanes);
    store(param + j, moved, lanes);
    if (low) store(low + j, rounded<T>(moved), lanes);
  });
}

template <class T, class Low>
void run(const AdamW& a) {
  const int64_t blocks = a.blocks[a.count];
  const int threads = team(blocks * kAdamWBlock, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) a.partials[block] = squares<T>(a, block_at(a, block));
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += double(a.partials[block]);
  const float norm = float(sqrt(total));
  *a.norm = norm;
  if (!(norm < INFINITY)) return;
  const Factors f = factors(a, norm);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) update<T, Low>(a, f, block_at(a, block));
  for (int64_t i = 0; i < a.count; ++i) a.steps[i] += 1;
}

template <class T>
void run(const AdamW& a) {
  if (a.low_dtype == FUSELORA_BF16) return run<T, bf16>(a);
  if (a.low_dtype == FUSELORA_F16) return run<T, fp16>(a);
  run<T, float>(a);
}

}  // namespace

void adamw(const AdamW& a) {
  if (a.dtype == FUSELORA_BF16) return run<bf16>(a);
  if (a.dtype == FUSELORA_F16) return run<fp16>(a);
  run<float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
