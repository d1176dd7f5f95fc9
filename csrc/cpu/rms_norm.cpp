// RMSNorm forward and backward. Formulas and rounding: kernels/rms_norm.py. Two passes over a row, the second from cache;
// threads share rows, so no thread count changes a bit.
#include "cpu/norm.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

// scale[j] = weight[j] in fp32, plus one in mode gemma, or one without a weight.
void fill_scale(float* scale, const void* weight, int32_t dtype, int64_t cols, int32_t mode) {
  fill_vector(scale, weight, dtype, cols, mode == FUSELORA_GEMMA ? 1.f : 0.f, 1.f);
}

template <class T, class Y>
void forward_row(const RmsNorm& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.cols;
  const T* h = x;
  float squares;
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.cols;
    T* sum_out = static_cast<T*>(a.h) + row * a.cols;
    squares = reduce(a.cols, [&](Vec acc, int64_t j, auto lanes) {
      const Vec value = rounded<T>(load(x + j, lanes) + load(residual + j, lanes));
      store(sum_out + j, value, lanes);
      return fma(value, value, acc);
    });
    h = sum_out;
  } else {
    squares = reduce(a.cols, [&](Vec acc, int64_t j, auto lanes) {
      const Vec value = load(x + j, lanes);
      return fma(value, value, acc);
    });
  }
  const float rstd = 1.f / sqrtf(squares / float(a.cols) + a.eps);
  a.rstd[row] = rstd;
  Y* y = static_cast<Y*>(a.y) + row * a.cols;
  const Vec factor = splat(rstd);
  if (a.mode == FUSELORA_LLAMA) {
    each(a.cols, [&](int64_t j, auto lanes) {
      store(y + j, rounded<T>(load(h + j, lanes) * factor) * load(a.scale + j, lanes), lanes);
    });
  } else {
    each(a.cols, [&](int64_t j, auto lanes) {
      store(y + j, load(h + j, lanes) * factor * load(a.scale + j, lanes), lanes);
    });
  }
}

template <class T, class Y>
void forward(const RmsNorm& a) {
  fill_scale(a.scale, a.weight, a.weight_dtype, a.cols, a.mode);
  const int threads = team(a.rows * a.cols, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) forward_row<T, Y>(a, row);
}

// dx of one row; with recent, also recent[j] += dy_j * xhat_j.
template <class T, class Y>
void backward_row(const RmsNormBwd& a, int64_t row, float* recent) {
  const Y* dy = static_cast<const Y*>(a.dy) + row * a.cols;
  const T* h = static_cast<const T*>(a.h) + row * a.cols;
  const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.cols : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.cols;
  const Vec rstd = splat(a.rstd[row]);
  const float dot = reduce(a.cols, [&](Vec acc, int64_t j, auto lanes) {
    return fma(load(dy + j, lanes) * load(a.scale + j, lanes), load(h + j, lanes) * rstd, acc);
  });
  const Vec minus_mean = splat(-dot / float(a.cols)), zero = splat(0);
  const bool round_xhat = a.mode == FUSELORA_LLAMA;
  each(a.cols, [&](int64_t j, auto lanes) {
    const Vec upstream = load(dy + j, lanes), xhat = load(h + j, lanes) * rstd;
    const Vec inner = fma(xhat, minus_mean, upstream * load(a.scale + j, lanes));
    store(dx + j, fma(inner, rstd, dh ? load(dh + j, lanes) : zero), lanes);
    if (recent) {
      const Vec normed = round_xhat ? rounded<T>(xhat) : xhat;
      store(recent + j, fma(upstream, normed, load(recent + j, lanes)), lanes);
    }
  });
}

// dx of a block of rows, and its part of dw.
template <class T, class Y>
void backward_block(const RmsNormBwd& a, int64_t block) {
  float* total = a.dw ? a.partials + 2 * block * a.cols : nullptr;
  float* recent = a.dw ? total + a.cols : nullptr;
  if (a.dw) std::memset(total, 0, 2 * a.cols * sizeof(float));
  const int64_t start = block * dw_block_rows(a.rows), stop = start + dw_block_rows(a.rows);
  const int64_t end = stop < a.rows ? stop : a.rows;
  for (int64_t row = start; row < end; ++row) {
    backward_row<T, Y>(a, row, recent);
    if (a.dw && ((row - start + 1) % kDwRows == 0 || row + 1 == end)) flush(total, recent, a.cols);
  }
}

template <class W>
void reduce_dw(const RmsNormBwd& a) {
  reduce_blocks(static_cast<W*>(a.dw), a.partials, a.rows, a.cols, a.threads);
}

template <class T, class Y>
void backward(const RmsNormBwd& a) {
  fill_scale(a.scale, a.weight, a.weight_dtype, a.cols, a.mode);
  const int threads = team(a.rows * a.cols, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < dw_blocks(a.rows); ++block) backward_block<T, Y>(a, block);
  if (!a.dw) return;
  if (a.weight_dtype == FUSELORA_BF16) return reduce_dw<bf16>(a);
  if (a.weight_dtype == FUSELORA_F16) return reduce_dw<fp16>(a);
  reduce_dw<float>(a);
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  const bool wide = a.mode == FUSELORA_LLAMA && a.weight && a.weight_dtype != a.dtype;
  if (a.dtype == FUSELORA_BF16) return wide ? forward<bf16, float>(a) : forward<bf16, bf16>(a);
  if (a.dtype == FUSELORA_F16) return wide ? forward<fp16, float>(a) : forward<fp16, fp16>(a);
  forward<float, float>(a);
}

void rms_norm_bwd(const RmsNormBwd& a) {
  const bool wide = a.dy_dtype != a.dtype;
  if (a.dtype == FUSELORA_BF16) return wide ? backward<bf16, float>(a) : backward<bf16, bf16>(a);
  if (a.dtype == FUSELORA_F16) return wide ? backward<fp16, float>(a) : backward<fp16, fp16>(a);
  backward<float, float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
