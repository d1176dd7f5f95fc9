// What every library of the C ABI keeps and checks: the last error of a thread, and the ranges of arguments.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "fuselora.h"

namespace fuselora {

inline thread_local char last_error[512] = "";

__attribute__((format(printf, 2, 3))) inline int32_t fail(int32_t status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

inline bool is_dtype(int32_t dtype) {
  return dtype == FUSELORA_F32 || dtype == FUSELORA_BF16 || dtype == FUSELORA_F16;
}

// Of a 4-bit weight.
inline bool is_blocksize(int64_t size) { return size >= 32 && size <= 4096 && (size & (size - 1)) == 0; }

}  // namespace fuselora
