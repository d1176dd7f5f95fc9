// AMX: eight tile registers of up to sixteen rows of 64 bytes, and the product of two of them (Intel SDM, TDPBF16PS).
//
//   sum [rows, 16] += left [rows, 2 pairs] right [pairs, 16 columns of pairs]      bf16 operands, fp32 sums
//
// Each instruction adds its even and its odd products up by themselves, from zero and over ascending k, then one to the
// other, and that to the sum; subnormals are zeros, MXCSR is not asked. The right operand's layout is that of
// vdpbf16ps: pairs of k beside each other.
//
// Inline assembly, because gcc's intrinsics don't tell the compiler which memory a tile load reads: stores to it could
// move behind the load. Tests run the same templates on an emulation, tests/native/emulated_tiles.h.
#pragma once

#include <cstdint>

#if defined(__AMX_BF16__) || defined(FUSELORA_AMX_EMULATED)
#define FUSELORA_TILES

namespace fuselora {
namespace FUSELORA_ISA {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;
constexpr int kTilePairs = 16, kTileDepth = 2 * kTilePairs, kTileColumns = 16;

// What ldtilecfg reads. A palette of 1, and rows and bytes of a row for each tile.
struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

}  // namespace FUSELORA_ISA
}  // namespace fuselora

#if defined(FUSELORA_AMX_EMULATED)
#include "emulated_tiles.h"
#else

namespace fuselora {
namespace FUSELORA_ISA {

// Configuring zeroes all tiles.
static inline void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
static inline void release_tiles() { asm volatile("tilerelease"); }

template <int tile>
static inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Rows are `stride` bytes apart.
template <int tile>
static inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
static inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int left, int right>
static inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora

#endif
#endif
