// The CUDA library's entry points: argument checks, grids and launches.
#include "cuda/device.cuh"
#include "cuda/nf4.cuh"
#include "cuda/nf4_matmul.cuh"
#include "status.h"

namespace fuselora {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;  // of 256 threads: more than are resident at once

int32_t finish(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return FUSELORA_OK;
  (void)cudaGetLastError();  // so that the next call doesn't report it again
  return fail(FUSELORA_CUDA_ERROR, "%s: CUDA: %s", op, cudaGetErrorString(error));
}

cudaError_t device_attribute(int* value, cudaDeviceAttr which) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, which, device) : error;
}

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, const Arguments& arguments, void* stream) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(kThreads), pointers, 0,
                          static_cast<cudaStream_t>(stream));
}

template <class T, int kSteps>
cudaError_t dequantize(Dequantize a, void* stream) {
  int multiprocessors = 0;
  const cudaError_t error = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return error;
  const int64_t blocks = plan<T>(a, kSteps, int64_t(multiprocessors) * kBlocksPerMultiprocessor);
  return launch(dequantize_4bit<T, kSteps>, blocks, a, stream);
}

template <class T>
cudaError_t dequantize(const Dequantize& a, void* stream) {
  return a.w.log_blocksize == 5 ? dequantize<T, 4>(a, stream) : dequantize<T, 8>(a, stream);
}

bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

bool is_aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

Weight4bit weight(const uint8_t* data, const void* absmax, const float* code, const float* absmax2, const float* code2,
                  const float* offset, int64_t blocksize, int64_t blocksize2) {
  const auto log2 = [](int64_t x) { return is_power_of_two(x) ? __builtin_ctzll(uint64_t(x)) : -1; };
  return {data, absmax, code, absmax2, code2, offset, log2(blocksize), blocksize2, log2(blocksize2)};
}

}  // namespace
}  // namespace fuselora

using namespace fuselora;

int32_t fuselora_cuda_abi_version(void) { return FUSELORA_ABI_VERSION; }

const char* fuselora_cuda_last_error(void) { return last_error; }

int32_t fuselora_cuda_check(void) {
  cudaFuncAttributes attributes;
  return finish("libfuselora_cuda.so",
                cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(dequantize_4bit<bf16, 8>)));
}

int32_t fuselora_cuda_dequantize_4bit(void* out, const uint8_t* data, const void* absmax, const float* code,
                                      const float* absmax2, const float* code2, const float* offset, int64_t n,
                                      int64_t blocksize, int64_t blocksize2, int32_t dtype, void* stream) {
  if (n < 0 || !is_blocksize(blocksize) || blocksize2 < 1 || !is_dtype(dtype) || (absmax2 && (!code2 || !offset)))
    return fail(FUSELORA_BAD_ARGUMENT, "dequantize_4bit: bad argument: n %lld, block sizes %lld %lld, dtype %d, %s",
                static_cast<long long>(n), static_cast<long long>(blocksize), static_cast<long long>(blocksize2), dtype,
                absmax2 ? "nested" : "plain");
  if (n == 0) return FUSELORA_OK;
  const Dequantize a = {out, weight(data, absmax, code, absmax2, code2, offset, blocksize, blocksize2), n};
  const cudaError_t error = dtype == FUSELORA_BF16  ? dequantize<bf16>(a, stream)
                            : dtype == FUSELORA_F16 ? dequantize<fp16>(a, stream)
                                                    : dequantize<float, 8>(a, stream);
  return finish("dequantize_4bit", error);
}

int32_t fuselora_cuda_matmul_4bit(void* y, const void* x, const uint8_t* data, const void* absmax, const float* code,
                                  const float* absmax2, const float* code2, const float* offset, const void* bias,
                                  int64_t m, int64_t rows, int64_t cols, int64_t blocksize, int64_t blocksize2,
                                  int32_t dtype, void* stream) {
  if (m < 0 || m > kMaxM || rows < 0 || rows > INT32_MAX || cols < 1 || cols > INT32_MAX / 2 || cols % kChunk ||
      !is_blocksize(blocksize) || blocksize < kChunk || !is_power_of_two(blocksize2) ||
      (dtype != FUSELORA_BF16 && dtype != FUSELORA_F16) || (absmax2 && (!code2 || !offset)) || !is_aligned(x, 16) ||
      !is_aligned(data, 8))
    return fail(FUSELORA_BAD_ARGUMENT,
                "matmul_4bit: bad argument: m %lld, rows %lld, cols %lld, block sizes %lld %lld, dtype %d, %s, x at %p, "
                "data at %p",
                static_cast<long long>(m), static_cast<long long>(rows), static_cast<long long>(cols),
                static_cast<long long>(blocksize), static_cast<long long>(blocksize2), dtype,
                absmax2 ? "nested" : "plain", x, static_cast<const void*>(data));
  if (m == 0 || rows == 0) return FUSELORA_OK;
  int major = 0;
  cudaError_t error = device_attribute(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess && major < 8)
    return fail(FUSELORA_BAD_ARGUMENT, "matmul_4bit: expected compute capability 8.0 or later, got %d.x", major);
  if (error == cudaSuccess) {
    const Weight4bit w = weight(data, absmax, code, absmax2, code2, offset, blocksize, blocksize2);
    const Matmul4bit a = {y, x, bias, w, rows, int32_t(cols), int32_t(m)};
    const int64_t blocks = (rows + kRows - 1) / kRows;
    error = dtype == FUSELORA_BF16 ? launch(matmul_4bit<bf16>, blocks, a, stream)
                                   : launch(matmul_4bit<fp16>, blocks, a, stream);
  }
  return finish("matmul_4bit", error);
}
