// LayerNorm forward and backward. Formulas: kernels/layer_norm.py. Three passes over a row forward and two backward, all
// but the first from cache; threads share rows, so no thread count changes a bit.
#include "cpu/norm.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

struct Pair {
  float first, second;
};

// Two sums in one pass: body(first, second, j, lanes) adds to both accumulators; otherwise as reduce.
template <class Body>
Pair reduce_pair(int64_t cols, Body body) {
  Vec a = splat(0), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
  int64_t j = 0;
  for (; j + 4 * kLanes <= cols; j += 4 * kLanes) {
    body(a, e, j, Full{});
    body(b, f, j + kLanes, Full{});
    body(c, g, j + 2 * kLanes, Full{});
    body(d, h, j + 3 * kLanes, Full{});
  }
  for (; j + kLanes <= cols; j += kLanes) body(a, e, j, Full{});
  if (j < cols) body(b, f, j, Tail{int(cols - j)});
  return {sum((a + b) + (c + d)), sum((e + f) + (g + h))};
}

// The second pass is about a mean that rounding moved away from the true one by c, the deviations' own mean: c corrects
// the mean to the nearest fp32 and the variance by c^2, however far a row lies from zero.
template <class T>
void forward_row(const LayerNorm& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.cols;
  T* y = static_cast<T*>(a.y) + row * a.cols;
  const float count = float(a.cols);
  const float rough = reduce(a.cols, [&](Vec acc, int64_t j, auto lanes) { return acc + load(x + j, lanes); }) / count;
  float about[kLanes];  // loaded like x, so that lanes beyond a short end deviate by zero
  store(about, splat(rough), Full{});
  const Pair sums = reduce_pair(a.cols, [&](Vec& first, Vec& second, int64_t j, auto lanes) {
    const Vec deviation = load(x + j, lanes) - load(about, lanes);
    first = first + deviation;
    second = fma(deviation, deviation, second);
  });
  const float correction = sums.first / count, variance = sums.second / count - correction * correction;
  a.mean[row] = rough + correction;
  a.rstd[row] = 1.f / sqrtf((variance < 0 ? 0.f : variance) + a.eps);
  const Vec mean = splat(a.mean[row]), rstd = splat(a.rstd[row]);
  each(a.cols, [&](int64_t j, auto lanes) {
    store(y + j, fma((load(x + j, lanes) - mean) * rstd, load(a.scale + j, lanes), load(a.shift + j, lanes)), lanes);
  });
}

template <class T>
void forward(const LayerNorm& a) {
  fill_vector(a.scale, a.weight, a.weight_dtype, a.cols, 0.f, 1.f);
  fill_vector(a.shift, a.bias, a.bias_dtype, a.cols, 0.f, 0.f);
  const int threads = team(a.rows * a.cols, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) forward_row<T>(a, row);
}

// The latest rows' sums of a block, or null where they aren't wanted.
struct Recent {
  float* dw;
  float* db;
};

// dx of one row; also recent.dw[j] += dy_j * xhat_j and recent.db[j] += dy_j.
template <class T>
void backward_row(const LayerNormBwd& a, int64_t row, Recent recent) {
  const T* dy = static_cast<const T*>(a.dy) + row * a.cols;
  const T* x = static_cast<const T*>(a.x) + row * a.cols;
  T* dx = static_cast<T*>(a.dx) + row * a.cols;
  const Vec mean = splat(a.mean[row]), rstd = splat(a.rstd[row]);
  const Pair sums = reduce_pair(a.cols, [&](Vec& first, Vec& second, int64_t j, auto lanes) {
    const Vec g = load(dy + j, lanes) * load(a.scale + j, lanes);
    first = first + g;
    second = fma(g, (load(x + j, lanes) - mean) * rstd, second);
  });
  const Vec mean_g = splat(sums.first / float(a.cols)), minus_dot = splat(-sums.second / float(a.cols));
  each(a.cols, [&](int64_t j, auto lanes) {
    const Vec upstream = load(dy + j, lanes), xhat = (load(x + j, lanes) - mean) * rstd;
    store(dx + j, fma(xhat, minus_dot, upstream * load(a.scale + j, lanes) - mean_g) * rstd, lanes);
    if (recent.dw) store(recent.dw + j, fma(upstream, xhat, load(recent.dw + j, lanes)), lanes);
    if (recent.db) store(recent.db + j, upstream + load(recent.db + j, lanes), lanes);
  });
}

// dx of a block of rows, and its part of dw and db.
template <class T>
void backward_block(const LayerNormBwd& a, int64_t block) {
  float* dw = a.dw ? a.dw_partials + 2 * block * a.cols : nullptr;
  float* db = a.db ? a.db_partials + 2 * block * a.cols : nullptr;
  const Recent recent = {dw ? dw + a.cols : nullptr, db ? db + a.cols : nullptr};
  if (dw) std::memset(dw, 0, 2 * a.cols * sizeof(float));
  if (db) std::memset(db, 0, 2 * a.cols * sizeof(float));
  const int64_t start = block * dw_block_rows(a.rows), stop = start + dw_block_rows(a.rows);
  const int64_t end = stop < a.rows ? stop : a.rows;
  for (int64_t row = start; row < end; ++row) {
    backward_row<T>(a, row, recent);
    if ((row - start + 1) % kDwRows != 0 && row + 1 != end) continue;
    if (dw) flush(dw, recent.dw, a.cols);
    if (db) flush(db, recent.db, a.cols);
  }
}

template <class T>
void backward(const LayerNormBwd& a) {
  fill_vector(a.scale, a.weight, a.weight_dtype, a.cols, 0.f, 1.f);
  const int threads = team(a.rows * a.cols, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < dw_blocks(a.rows); ++block) backward_block<T>(a, block);
  if (a.dw) reduce_blocks(a.dw, a.dw_partials, a.rows, a.cols, a.threads);
  if (a.db) reduce_blocks(a.db, a.db_partials, a.rows, a.cols, a.threads);
}

}  // namespace

void layer_norm(const LayerNorm& a) {
  if (a.dtype == FUSELORA_BF16) return forward<bf16>(a);
  if (a.dtype == FUSELORA_F16) return forward<fp16>(a);
  forward<float>(a);
}

void layer_norm_bwd(const LayerNormBwd& a) {
  if (a.dtype == FUSELORA_BF16) return backward<bf16>(a);
  if (a.dtype == FUSELORA_F16) return backward<fp16>(a);
  backward<float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
