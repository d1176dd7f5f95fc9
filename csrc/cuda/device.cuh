// The machine instructions that kernels name. tests/native/emulated_device.h has the same functions for the host.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fuselora {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// `value` of the lane whose number within its segment of kWidth lanes is the lowest bits of `lane`.
template <int kWidth, class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane, kWidth);
}

// Products and sums that the compiler does not fuse.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }

// Read once: first to leave the caches.
template <class T>
__device__ __forceinline__ T load_once(const T* p) {
  return __ldcs(p);
}

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ fp16 narrow<fp16>(float x) { return __float2half_rn(x); }

// Two values rounded to T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t narrow_pair<bf16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<fp16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

// The two halves of a word of T.
template <class T>
__device__ __forceinline__ float2 widen_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 widen_pair<bf16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 widen_pair<fp16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(fp16 x) { return __half2float(x); }

// The nearest number with 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ float round_tf32(float x) {
  return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
}

// acc [16, 8] += a [16, 8] b [8, 8], fp32 sums of tf32 products. With g = lane / 4 and t = lane % 4, a lane holds
// a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4]; b[t][g], b[t + 4][g]; acc[g][2t, 2t + 1], acc[g + 8][2t, 2t + 1].
// PTX ISA, "Matrix Fragments for mma.m16n8k8".
__device__ __forceinline__ void mma(float (&acc)[4], const float (&a)[4], const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
  __trap();  // the entry point refuses these devices
#endif
}

}  // namespace fuselora
