/* The C ABI from plain C: the header compiles as C99, known answers, short rows, error sentences. One argument: the
 * instruction set that FUSELORA_CPU_ISA asks for; exit code 77 (skipped) where the CPU doesn't have it. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "fuselora.h"

static int failures = 0;

#define EXPECT(condition)                                                \
  do {                                                                   \
    if (!(condition)) {                                                  \
      printf("%s:%d: expected %s\n", __FILE__, __LINE__, #condition);    \
      ++failures;                                                        \
    }                                                                    \
  } while (0)

/* Random123's published known-answer vectors for philox4x32 with 10 rounds. */
static void test_philox(void) {
  static const uint32_t counters[3][4] = {
      {0, 0, 0, 0}, {~0u, ~0u, ~0u, ~0u}, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}};
  static const uint32_t keys[3][2] = {{0, 0}, {~0u, ~0u}, {0xa4093822, 0x299f31d0}};
  static const uint32_t answers[3][4] = {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  for (int i = 0; i < 3; ++i) {
    uint32_t out[4];
    fuselora_philox(out, counters[i], keys[i]);
    EXPECT(memcmp(out, answers[i], sizeof out) == 0);
  }
}

/* Every element of a buffer is decided by its own word; nothing beyond n is written. */
static void test_dropout(void) {
  enum { kSize = 1100 };
  const uint64_t seed = 0x123456789abcdef0u;
  const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)}, threshold = 0x40000000;
  float x[kSize], y[kSize + 1];
  for (int n = 0; n <= kSize; n += 100) {
    for (int i = 0; i < kSize; ++i) x[i] = (float)(i + 1);
    y[n] = -1;
    EXPECT(fuselora_dropout(y, x, n, FUSELORA_F32, seed, threshold, 2.0f, 1) == FUSELORA_OK);
    EXPECT(y[n] == -1);
    for (int i = 0; i < n; ++i) {
      const uint32_t counter[4] = {(uint32_t)(i / 4), 0, 0, 0};
      uint32_t words[4];
      fuselora_philox(words, counter, key);
      EXPECT(y[i] == (words[i % 4] >= threshold ? 2.0f * x[i] : 0.0f));
    }
  }
}

static void test_rms_norm(void) {
  enum { kRows = 3, kCols = 37 };
  float x[kRows * kCols], y[kRows * kCols], weight[kCols], rstd[kRows];
  for (int i = 0; i < kRows * kCols; ++i) x[i] = (float)(i % 7) - 2.5f;
  for (int j = 0; j < kCols; ++j) weight[j] = 0.5f + (float)j;
  EXPECT(fuselora_rms_norm(y, NULL, rstd, x, NULL, weight, kRows, kCols, FUSELORA_F32, FUSELORA_F32, 1e-6,
                           FUSELORA_LLAMA, 2) == FUSELORA_OK);
  for (int row = 0; row < kRows; ++row) {
    double squares = 0;
    for (int j = 0; j < kCols; ++j) squares += (double)x[row * kCols + j] * x[row * kCols + j];
    const double exact = 1 / sqrt(squares / kCols + 1e-6);
    EXPECT(fabs(rstd[row] - exact) <= 1e-6 * exact);
    for (int j = 0; j < kCols; ++j) {
      const double truth = weight[j] * x[row * kCols + j] * exact;
      EXPECT(fabs(y[row * kCols + j] - truth) <= 1e-6 * fabs(truth));
    }
  }
}

/* Two steps' worth of known answers on a tensor with a short end and an empty one, clipped to norm 1; then a gradient that
 * is not finite, which changes nothing but the norm. */
static void test_adamw(void) {
  enum { kSize = 37 };
  float p[kSize + 1], g[kSize], m[kSize + 1] = {0}, v[kSize + 1] = {0}, steps[2] = {0, 0}, norm = -1;
  void* params[2] = {p, p};
  const void* grads[2] = {g, g};
  const int64_t sizes[2] = {kSize, 0}, offsets[2] = {0, kSize};
  const double lrs[2] = {0.01, 1}, decays[2] = {0.1, 0};
  double exact[kSize], squares = 0;
  for (int i = 0; i < kSize; ++i) {
    g[i] = (float)(i % 5) - 1.75f;
    exact[i] = p[i] = 1 + 0.25f * (float)i;
    squares += (double)g[i] * g[i];
  }
  p[kSize] = m[kSize] = v[kSize] = -1;
  const double clip = 1 / (sqrt(squares) + 1e-6);
  for (int step = 0; step < 2; ++step) {
    EXPECT(fuselora_adamw(&norm, params, grads, NULL, sizes, offsets, 2, m, v, steps, lrs, decays, 0.9, 0.99, 1e-8, 1,
                          NULL, FUSELORA_F32, FUSELORA_F32, 2) == FUSELORA_OK);
    EXPECT(fabs(norm - sqrt(squares)) <= 1e-6 * norm);
    /* A constant gradient: both moments divided by their corrections are the gradient and its square. */
    for (int i = 0; i < kSize; ++i) exact[i] -= 0.01 * (0.1 * exact[i] + g[i] * clip / (fabs(g[i] * clip) + 1e-8));
  }
  for (int i = 0; i < kSize; ++i) EXPECT(fabs(p[i] - exact[i]) <= 4e-7 * exact[i]);
  EXPECT(p[kSize] == -1 && m[kSize] == -1 && v[kSize] == -1 && steps[0] == 2 && steps[1] == 2);
  const float before = p[7];
  g[kSize - 1] = INFINITY;
  EXPECT(fuselora_adamw(&norm, params, grads, NULL, sizes, offsets, 2, m, v, steps, lrs, decays, 0.9, 0.99, 1e-8, 1,
                        NULL, FUSELORA_F32, FUSELORA_F32, 2) == FUSELORA_OK);
  EXPECT(!(norm < INFINITY) && p[7] == before && steps[0] == 2);
}

/* Rows with a short end, far from zero; the gradients against sums of their formulas in double. */
static void test_layer_norm(void) {
  enum { kRows = 11, kCols = 37 };
  float x[kRows * kCols], y[kRows * kCols], dy[kRows * kCols], dx[kRows * kCols];
  float weight[kCols], bias[kCols], dw[kCols], db[kCols], mean[kRows], rstd[kRows];
  double exact_dw[kCols] = {0}, exact_db[kCols] = {0};
  for (int i = 0; i < kRows * kCols; ++i) x[i] = 1e4f + (float)(i % 7), dy[i] = (float)(i % 5) - 1.5f;
  for (int j = 0; j < kCols; ++j) weight[j] = 0.5f + (float)j / 8, bias[j] = (float)j - 3;
  EXPECT(fuselora_layer_norm(y, mean, rstd, x, weight, bias, kRows, kCols, FUSELORA_F32, FUSELORA_F32, FUSELORA_F32, 1e-5,
                             2) == FUSELORA_OK);
  EXPECT(fuselora_layer_norm_bwd(dx, dw, db, dy, x, weight, mean, rstd, kRows, kCols, FUSELORA_F32, FUSELORA_F32, 2) ==
         FUSELORA_OK);
  for (int row = 0; row < kRows; ++row) {
    const float *xs = x + row * kCols, *dys = dy + row * kCols;
    double centre = 0, variance = 0, mean_g = 0, dot = 0;
    for (int j = 0; j < kCols; ++j) centre += xs[j] / (double)kCols;
    for (int j = 0; j < kCols; ++j) variance += (xs[j] - centre) * (xs[j] - centre) / kCols;
    const double scale = 1 / sqrt(variance + 1e-5);
    EXPECT(fabs(mean[row] - centre) <= 5e-4 && fabs(rstd[row] - scale) <= 1e-6 * scale);
    for (int j = 0; j < kCols; ++j) {
      const double xhat = (xs[j] - centre) * scale;
      mean_g += dys[j] * weight[j] / kCols;
      dot += dys[j] * weight[j] * xhat / kCols;
      exact_dw[j] += dys[j] * xhat;
      exact_db[j] += dys[j];
    }
    for (int j = 0; j < kCols; ++j) {
      const double xhat = (xs[j] - centre) * scale;
      EXPECT(fabs(y[row * kCols + j] - (xhat * weight[j] + bias[j])) <= 2e-3);
      EXPECT(fabs(dx[row * kCols + j] - scale * (dys[j] * weight[j] - mean_g - xhat * dot)) <= 2e-3);
    }
  }
  for (int j = 0; j < kCols; ++j) EXPECT(fabs(dw[j] - exact_dw[j]) <= 5e-3 && fabs(db[j] - exact_db[j]) <= 1e-5);
}

static void test_errors(void) {
  float x = 0;
  void* tensor = &x;
  const void* gradient = &x;
  const int64_t size = -1, offset = 0;
  const double rate = 0;
  EXPECT(fuselora_abi_version() == FUSELORA_ABI_VERSION);
  EXPECT(fuselora_dropout(&x, &x, 1, 9, 0, 0, 1, 1) == FUSELORA_BAD_ARGUMENT);
  EXPECT(strstr(fuselora_last_error(), "dtype 9") != NULL);
  EXPECT(fuselora_rms_norm_bwd(&x, &x, &x, NULL, &x, NULL, &x, 1, 1, 0, 0, 0, 0, 1) == FUSELORA_BAD_ARGUMENT);
  EXPECT(strstr(fuselora_last_error(), "without weight") != NULL);
  EXPECT(fuselora_adamw(&x, &tensor, &gradient, NULL, &size, &offset, 1, &x, &x, &x, &rate, &rate, 0.9, 0.99, 1e-8, 1, NULL,
                        FUSELORA_F32, FUSELORA_F32, 1) == FUSELORA_BAD_ARGUMENT);
  EXPECT(strstr(fuselora_last_error(), "size -1") != NULL);
  EXPECT(fuselora_layer_norm(&x, &x, &x, &x, NULL, NULL, 1, 1, 0, 0, 7, 1e-5, 1) == FUSELORA_BAD_ARGUMENT);
  EXPECT(strstr(fuselora_last_error(), "dtypes 0 0 7") != NULL);
  EXPECT(fuselora_layer_norm_bwd(&x, NULL, NULL, &x, &x, NULL, &x, &x, -1, 1, 0, 0, 1) == FUSELORA_BAD_ARGUMENT);
  EXPECT(strstr(fuselora_last_error(), "rows -1") != NULL);
}

int main(int count, char** arguments) {
  const char* isa = fuselora_cpu_isa();
  if (isa == NULL) {
    puts(fuselora_last_error());
    return 77;
  }
  EXPECT(count == 2 && strcmp(isa, arguments[1]) == 0);
  test_philox();
  test_dropout();
  test_rms_norm();
  test_adamw();
  test_layer_norm();
  test_errors();
  printf("%s: %s\n", isa, failures ? "FAILED" : "passed");
  return failures != 0;
}
