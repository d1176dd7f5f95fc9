// Counter-based dropout: the mask is a function of (seed, element index), so backward regenerates it and nothing is
// stored.
#include "cpu/kernels.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

template <class T>
void apply(const Dropout& a) {
  constexpr int64_t group = 1024;  // elements per step: the words stay in the first-level cache
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const Vec scale = splat(a.scale);
  const int64_t groups = (a.n + group - 1) / group;
  const int threads = team(a.n, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = g * group, count = a.n - start < group ? a.n - start : group;
    uint32_t words[group];
    for (int64_t i = 0; i < count; i += 4 * kWide) philox_words(words + i, uint64_t(start + i) / 4, a.seed);
    each(count, [&](int64_t j, auto lanes) {
      store(y + start + j, keep(load(x + start + j, lanes) * scale, words + j, a.threshold), lanes);
    });
  }
}

}  // namespace

void philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
  Wide w[4];
  for (int lane = 0; lane < 4; ++lane) w[lane] = wide(counter[lane]);
  philox_rounds(w, key[0], key[1]);
  uint32_t words[4 * kWide];
  store_words(words, w);
  for (int lane = 0; lane < 4; ++lane) out[lane] = words[lane];
}

void dropout(const Dropout& a) {
  if (a.dtype == FUSELORA_BF16) return apply<bf16>(a);
  if (a.dtype == FUSELORA_F16) return apply<fp16>(a);
  apply<float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
