// What the C ABI's entry points share, whichever csrc/abi*.cpp they are in: the kernels of the instruction set in use, and
// scratch memory. A kernel has a declaration in cpu/kernels.h, a member here and an entry of dispatch.cpp's table.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "cpu/kernels.h"

namespace fuselora {

struct Kernels {
  const char* isa;
  decltype(&scalar::rms_norm) rms_norm;
  decltype(&scalar::rms_norm_bwd) rms_norm_bwd;
  decltype(&scalar::layer_norm) layer_norm;
  decltype(&scalar::layer_norm_bwd) layer_norm_bwd;
  decltype(&scalar::dropout) dropout;
  decltype(&scalar::adamw) adamw;
  decltype(&scalar::glu) glu;
  decltype(&scalar::glu_bwd) glu_bwd;
  decltype(&scalar::rope) rope;
  decltype(&scalar::cross_entropy) cross_entropy;
  decltype(&scalar::dequantize_4bit) dequantize_4bit;
  decltype(&scalar::quantize_4bit) quantize_4bit;
  decltype(&scalar::quantize_absmax) quantize_absmax;
  decltype(&scalar::gemm) gemm;
  decltype(&scalar::attention) attention;
  decltype(&scalar::attention_bwd) attention_bwd;
  decltype(&scalar::philox) philox;
};

// Of the best instruction set of this machine, or of the one that FUSELORA_CPU_ISA names; nullptr, with a sentence in
// last_error, if that isn't there.
const Kernels* kernels();

// Why a better instruction set than the chosen one doesn't run, or "".
extern char isa_note[160];

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float, Free>;

inline Scratch scratch(int64_t count) { return Scratch(static_cast<float*>(std::malloc(size_t(count) * sizeof(float)))); }

}  // namespace fuselora
