// The choice of instruction set: one table of kernels for each that this build has.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "cpu/amx_permission.h"
#include "status.h"

namespace fuselora {

char isa_note[160] = "";

namespace {

#define FUSELORA_KERNELS(isa)                                                                      \
  {#isa, isa::rms_norm, isa::rms_norm_bwd, isa::layer_norm, isa::layer_norm_bwd, isa::dropout,     \
   isa::adamw, isa::glu, isa::glu_bwd, isa::rope, isa::cross_entropy, isa::dequantize_4bit,        \
   isa::quantize_4bit, isa::quantize_absmax, isa::gemm, isa::attention, isa::attention_bwd,        \
   isa::philox}

const Kernels kScalar = FUSELORA_KERNELS(scalar);
#if defined(__x86_64__)
const Kernels kAvx2 = FUSELORA_KERNELS(avx2);
const Kernels kAvx512 = FUSELORA_KERNELS(avx512);
const Kernels kAvx512Bf16 = FUSELORA_KERNELS(avx512_bf16);

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if defined(FUSELORA_HAS_AMX_EMULATED)
const Kernels kAmxEmulated = FUSELORA_KERNELS(amx_emulated);  // for tests: only where it is asked for
#endif
#if defined(FUSELORA_HAS_AMX)
const Kernels kAmx = FUSELORA_KERNELS(amx);

bool has_amx() { return has_avx512_bf16() && may_use_tiles(cpu_has_amx(), request_tiles, isa_note); }
#endif

// The best instruction set of this machine, or the one that FUSELORA_CPU_ISA names; nullptr if it isn't there.
const Kernels* choose() {
  const char* forced = std::getenv("FUSELORA_CPU_ISA");
  const bool any = forced == nullptr || *forced == '\0';
#if defined(FUSELORA_HAS_AMX_EMULATED)
  if (!any && std::strcmp(forced, "amx_emulated") == 0 && has_avx512_bf16()) return &kAmxEmulated;
#endif
#if defined(FUSELORA_HAS_AMX)
  if ((any || std::strcmp(forced, "amx") == 0) && has_amx()) return &kAmx;
#endif
#if defined(__x86_64__)
  if ((any || std::strcmp(forced, "avx512_bf16") == 0) && has_avx512_bf16()) return &kAvx512Bf16;
  if ((any || std::strcmp(forced, "avx512") == 0) && has_avx512()) return &kAvx512;
  if ((any || std::strcmp(forced, "avx2") == 0) && has_avx2()) return &kAvx2;
#endif
  return any || std::strcmp(forced, "scalar") == 0 ? &kScalar : nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* chosen = choose();
  if (chosen == nullptr)
    fail(FUSELORA_BAD_ISA,
         "FUSELORA_CPU_ISA: expected scalar, or avx2, avx512, avx512_bf16 or amx where the CPU has it, got '%s'%s%s; unset "
         "it",
         std::getenv("FUSELORA_CPU_ISA"), *isa_note ? ", and " : "", isa_note);
  return chosen;
}

}  // namespace fuselora
