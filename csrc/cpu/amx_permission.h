// Whether this process may use AMX: the processor has it, and Linux gives out the 8 KB of tile registers on request, once
// for all threads of a process (arch/x86: "Using XSTATE features in user space applications").
#pragma once

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace fuselora {

// amx_bf16 and amx_tile of CPUID, and both states of the tiles in XCR0.
inline bool cpu_has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned osxsave = 1u << 27, bf16 = 1u << 22, tile = 1u << 24, states = 3u << 17;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & states) == states;
}

// 0, or why not as an errno.
inline int request_tiles() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0 ? 0 : errno;
}

// Whether tiles can be used. Where the processor has them and the request is refused, `note` says so.
inline bool may_use_tiles(bool cpu_has_them, int (*request)(), char (&note)[160]) {
  if (!cpu_has_them) return false;
  const int refused = request();
  if (refused)
    std::snprintf(note, sizeof note, "amx is not used: the kernel refuses tile registers (arch_prctl: %s)",
                  std::strerror(refused));
  return !refused;
}

}  // namespace fuselora

#endif
