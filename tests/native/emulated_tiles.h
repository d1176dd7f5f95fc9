// AMX's tile instructions in plain C++, for the instruction set amx_emulated of test builds: csrc/cpu/amx.h without such
// a processor. What the instructions refuse (an undefined-opcode fault) ends the process with a sentence, and so does a
// thread that ends with its tiles not released.
#pragma once

#include <xmmintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fuselora {
namespace FUSELORA_ISA {

static inline void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

struct EmulatedTiles {
  TileShapes shapes;
  alignas(64) unsigned char bytes[kTiles][kTileRows][kTileBytes];
  ~EmulatedTiles() { must(shapes.palette == 0, "a thread ended before it released its tiles"); }
};
static thread_local EmulatedTiles emulated;

static inline void configure_tiles(const TileShapes& shapes) {
  must(shapes.palette == 1 && shapes.start_row == 0, "expected palette 1 and no row to start from");
  for (int i = 0; i < 16; ++i) {
    const bool none = shapes.rows[i] == 0 && shapes.row_bytes[i] == 0;
    const bool some = i < kTiles && shapes.rows[i] && shapes.row_bytes[i];
    must(none || (some && shapes.rows[i] <= kTileRows && shapes.row_bytes[i] <= kTileBytes), "a shape is too large");
  }
  for (const unsigned char byte : shapes.reserved) must(byte == 0, "a reserved byte is not zero");
  emulated.shapes = shapes;
  std::memset(emulated.bytes, 0, sizeof emulated.bytes);
}

static inline void release_tiles() { emulated.shapes = {}; }

static inline void must_have(int tile) {
  must(emulated.shapes.palette == 1 && emulated.shapes.rows[tile] > 0, "a tile is used that has no shape");
}

template <int tile>
static inline void zero_tile() {
  must_have(tile);
  std::memset(emulated.bytes[tile], 0, sizeof emulated.bytes[tile]);
}

template <int tile>
static inline void load_tile(const void* from, int64_t stride) {
  zero_tile<tile>();
  for (int i = 0; i < emulated.shapes.rows[tile]; ++i)
    std::memcpy(emulated.bytes[tile][i], static_cast<const char*>(from) + i * stride, emulated.shapes.row_bytes[tile]);
}

template <int tile>
static inline void store_tile(void* to, int64_t stride) {
  must_have(tile);
  for (int i = 0; i < emulated.shapes.rows[tile]; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, emulated.bytes[tile][i], emulated.shapes.row_bytes[tile]);
}

// The arithmetic. Called with MXCSR at round to nearest even, subnormals taken for and flushed to zero; not inlined, so
// that none of it leaves the two writes of MXCSR around it.
__attribute__((noinline)) static void multiply_emulated(const unsigned char* left, const unsigned char* right,
                                                        unsigned char* sums, int rows, int pairs) {
  for (int i = 0; i < rows; ++i) {
    float even[kTileColumns] = {}, odd[kTileColumns] = {}, sum[kTileColumns];
    for (int k = 0; k < pairs; ++k) {
      uint32_t pair, column[kTileColumns];
      std::memcpy(&pair, left + i * kTileBytes + 4 * k, 4);
      std::memcpy(column, right + k * kTileBytes, kTileBytes);
      const uint32_t halves[2] = {pair << 16, pair & 0xffff0000};
      float first, second;
      std::memcpy(&first, &halves[0], 4);
      std::memcpy(&second, &halves[1], 4);
      for (int j = 0; j < kTileColumns; ++j) {
        const uint32_t low = column[j] << 16, high = column[j] & 0xffff0000;
        float x, y;
        std::memcpy(&x, &low, 4);
        std::memcpy(&y, &high, 4);
        even[j] = __builtin_fmaf(first, x, even[j]);
        odd[j] = __builtin_fmaf(second, y, odd[j]);
      }
    }
    std::memcpy(sum, sums + i * kTileBytes, kTileBytes);
    for (int j = 0; j < kTileColumns; ++j) sum[j] = sum[j] + (even[j] + odd[j]);
    std::memcpy(sums + i * kTileBytes, sum, kTileBytes);
  }
}

template <int sum, int left, int right>
static inline void multiply_tiles() {
  static_assert(sum != left && sum != right && left != right, "the operands must differ");
  must_have(sum), must_have(left), must_have(right);
  const TileShapes& s = emulated.shapes;
  must(s.rows[sum] == s.rows[left] && s.row_bytes[left] == 4 * s.rows[right] && s.row_bytes[sum] == s.row_bytes[right],
       "the shapes of a product don't fit");
  must(s.row_bytes[sum] == kTileBytes, "sums of fewer columns are not emulated");
  const unsigned csr = _mm_getcsr();
  constexpr unsigned masked = 0x1f80, subnormals_are_zero = 0x8040;
  _mm_setcsr(masked | subnormals_are_zero);
  multiply_emulated(emulated.bytes[left][0], emulated.bytes[right][0], emulated.bytes[sum][0], s.rows[sum],
                    s.rows[right]);
  _mm_setcsr(csr);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
