// Counter-based dropout: the mask is a function of (seed, element index), so backward regenerates it and nothing is stored.
// Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3": Philox-4x32 with 10 rounds.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

// Two multipliers, two Weyl increments of the key (the golden ratio and sqrt(3) - 1 in 32 bits), ten rounds.
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;

// Sixteen blocks at a time: words[lane][block], in place. A loop over blocks, so that the compiler vectorises it.
struct Blocks {
  uint32_t words[4][kLanes];
};

inline void philox_rounds(Blocks& b, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product0 = uint64_t(kMultiplier0) * b.words[0][i];
      const uint64_t product1 = uint64_t(kMultiplier1) * b.words[2][i];
      b.words[0][i] = uint32_t(product1 >> 32) ^ b.words[1][i] ^ key0;
      b.words[1][i] = uint32_t(product1);
      b.words[2][i] = uint32_t(product0 >> 32) ^ b.words[3][i] ^ key1;
      b.words[3][i] = uint32_t(product0);
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

// factor[4 * i + lane] = scale where element 4 * (first + i) + lane is kept, else 0.
inline void fill_factors(float factor[4 * kLanes], const Dropout& a, uint64_t first) {
  Blocks b;
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t counter = first + uint64_t(i);
    b.words[0][i] = uint32_t(counter);
    b.words[1][i] = uint32_t(counter >> 32);
    b.words[2][i] = b.words[3][i] = 0;
  }
  philox_rounds(b, uint32_t(a.seed), uint32_t(a.seed >> 32));
  for (int i = 0; i < kLanes; ++i)
    for (int lane = 0; lane < 4; ++lane)
      factor[4 * i + lane] = b.words[lane][i] >= a.threshold ? a.scale : 0.f;
}

template <class T>
void apply(const Dropout& a) {
  constexpr int64_t group = 4 * kLanes;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t groups = (a.n + group - 1) / group;
  const int threads = team(a.n, a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    float factor[group];
    fill_factors(factor, a, uint64_t(g) * kLanes);
    const int64_t start = g * group, count = a.n - start < group ? a.n - start : group;
    each(count, [&](int64_t j, auto lanes) {
      store(y + start + j, load(x + start + j, lanes) * load(factor + j, lanes), lanes);
    });
  }
}

}  // namespace

void philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
  Blocks b = {};
  for (int lane = 0; lane < 4; ++lane) b.words[lane][0] = counter[lane];
  philox_rounds(b, key[0], key[1]);
  for (int lane = 0; lane < 4; ++lane) out[lane] = b.words[lane][0];
}

void dropout(const Dropout& a) {
  if (a.dtype == FUSELORA_BF16) return apply<bf16>(a);
  if (a.dtype == FUSELORA_F16) return apply<fp16>(a);
  apply<float>(a);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
