// The functions of csrc/cuda/device.cuh for the host, so that kernels run, thread by thread, without a GPU.
//
// emulate(kernel, blocks, arguments) runs one block after another. The threads of a block are contexts that take turns:
// each runs to its next shuffle, matrix product or barrier, publishes its operands and yields. When it is resumed, all
// others have published theirs. A lane whose partner is not at the same instruction aborts: on a GPU it would hang, or
// read what is undefined.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define FUSELORA_ISA scalar
#include "cpu/vec.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __syncthreads fuselora::barrier

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

namespace fuselora {

using scalar::bf16;
using scalar::fp16;

constexpr int kBlockThreads = 256, kOperands = 6;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false;
  uint64_t exchanges = 0, barriers = 0;
  float published[2][kOperands];  // of this exchange and of the one before, which others may still read
};

inline std::vector<Thread> threads(kBlockThreads);
inline ucontext_t scheduler;
inline int running = 0;

inline void yield() { swapcontext(&threads[running].context, &scheduler); }

// Publish `values`, and return how to read those of another lane of the warp.
template <int n>
auto exchange(const float (&values)[n]) {
  Thread& own = threads[running];
  const uint64_t turn = ++own.exchanges;
  std::memcpy(own.published[turn % 2], values, sizeof values);
  yield();
  return [turn, first = running / 32 * 32](int lane, int i) {
    const Thread& other = threads[first + lane];
    if (other.exchanges != turn && other.exchanges != turn + 1) {
      std::fprintf(stderr, "lane %d is not at exchange %llu of its warp\n", lane, static_cast<unsigned long long>(turn));
      std::abort();
    }
    return other.published[turn % 2][i];
  };
}

inline void barrier() {
  const uint64_t turn = ++threads[running].barriers;
  for (bool all = false; !all;) {
    yield();
    all = true;
    for (const Thread& other : threads) all = all && (other.done || other.barriers >= turn);
  }
}

template <int kWidth, class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == sizeof(float), "");
  const int own = running % 32;
  const auto published = exchange<1>({value});
  return published(own / kWidth * kWidth + (lane & (kWidth - 1)), 0);
}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }

template <class T>
T load_once(const T* p) {
  return *p;
}

template <class T>
T narrow(float x) {
  T narrowed;
  scalar::narrow(x, &narrowed);
  return narrowed;
}

template <class T>
uint32_t narrow_pair(float first, float second) {
  return uint32_t(narrow<T>(first).bits) | uint32_t(narrow<T>(second).bits) << 16;
}

template <class T>
float2 widen_pair(uint32_t pair) {
  return {widen(T{uint16_t(pair)}), widen(T{uint16_t(pair >> 16)})};
}

inline float round_tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u); }

inline void mma(float (&acc)[4], const float (&a)[4], const float (&b)[2]) {
  for (float x : {a[0], a[1], a[2], a[3], b[0], b[1]})
    if (__float_as_uint(x) & 0x1fffu) std::abort();  // no tf32 number: the hardware would drop these bits
  const int g = running % 32 / 4, t = running % 4;
  const auto published = exchange<6>({a[0], a[1], a[2], a[3], b[0], b[1]});
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k) {
      const int column = 2 * t + i % 2;
      const float left = published(4 * g + k % 4, i / 2 + 2 * (k / 4)), right = published(4 * column + k % 4, 4 + k / 4);
      acc[i] += left * right;
    }
}

// kernel<<<blocks, 256>>>(arguments), of which only the blocks from `first` on run.
template <class Arguments>
void emulate(void (*kernel)(Arguments), int64_t blocks, const Arguments& arguments, int64_t first = 0) {
  static void (*run)(Arguments);
  static const Arguments* given;
  run = kernel, given = &arguments;
  gridDim.x = unsigned(blocks);
  for (int64_t block = first; block < blocks; ++block) {
    for (Thread& thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      thread.done = false;
      thread.exchanges = thread.barriers = 0;
      makecontext(&thread.context, +[] { run(*given), threads[running].done = true; }, 0);
    }
    for (bool busy = true; busy;) {
      busy = false;
      for (running = 0; running < kBlockThreads; ++running) {
        if (threads[running].done) continue;
        threadIdx.x = unsigned(running), blockIdx.x = unsigned(block);
        swapcontext(&scheduler, &threads[running].context);
        busy = true;
      }
    }
  }
}

}  // namespace fuselora
