// Products out of AMX tiles (amx.h): blocks of up to two by two or one by four tiles of sums. At two by two a loaded tile
// is multiplied twice, the most that eight registers allow: four loads (8 cycles each out of the L1 cache) are behind
// four products of 16 cycles, whose latency of 52 the four sums cover.
//
// Whoever multiplies owns a TileScope; its end releases the thread's tiles, so that neither the library that the thread
// runs next nor a context switch meets ours.
#pragma once

#include <cstring>

#include "cpu/amx.h"

#if defined(FUSELORA_TILES)

namespace fuselora {
namespace FUSELORA_ISA {

// body(Index<0>), body(Index<1>), ...: tile registers are numbers in the instruction.
template <int i>
struct Index {
  static constexpr int value = i;
};
template <int n, class Body>
__attribute__((always_inline)) static inline void repeat(Body body) {
  if constexpr (n > 0) {
    repeat<n - 1>(body);
    body(Index<n - 1>{});
  }
}

// The shape that this thread's tiles have: rows of a block and pairs of k at a step; 0: released.
static thread_local uint32_t tile_shape = 0;

constexpr int kBlockTiles = 2, kTileBlockRows = kBlockTiles * kTileRows;

// Tiles for blocks of `rows` (1 to 32) and steps of `pairs` (1 to 16). Sums are in tiles 0 to 3. Above sixteen rows, left
// operands are in 4 and 5 and right ones in 6 and 7; else the left one is in 4 and right ones from 5 on.
static inline void shape_tiles(int64_t rows, int64_t pairs) {
  const uint32_t shape = uint32_t(rows << 8 | pairs);
  if (shape == tile_shape) return;
  TileShapes shapes;
  std::memset(&shapes, 0, sizeof shapes);
  shapes.palette = 1;
  const bool two = rows > kTileRows;
  const uint8_t first = uint8_t(two ? kTileRows : rows), second = uint8_t(two ? rows - kTileRows : rows);
  for (int i = 0; i < kTiles; ++i) {
    const bool sums = i < 4, left = !sums && i < (two ? 6 : 5);
    shapes.row_bytes[i] = uint16_t(left ? 4 * pairs : kTileBytes);
    shapes.rows[i] = uint8_t(sums ? (i < 2 ? first : second) : left ? (i == 4 ? first : second) : pairs);
  }
  configure_tiles(shapes);
  tile_shape = shape;
}

struct TileScope {
  TileScope() = default;
  TileScope(const TileScope&) = delete;
  ~TileScope() {
    if (tile_shape) release_tiles();
    tile_shape = 0;
  }
};

// Strides in bytes.
template <int kRows, int kColumns>
struct TileBlock {
  static constexpr int sum(int i, int j) { return 2 * i + j; }
  static constexpr int left(int i) { return 4 + i; }
  static constexpr int right(int j) { return 4 + kRows + j % (4 - kRows); }

  // Sums from sums [16 kRows, 16 kColumns] in memory, or zero.
  static inline void begin(const float* sums, int64_t stride, bool add) {
    const char* from = reinterpret_cast<const char*>(sums);
    repeat<kRows>([&](auto i) {
      repeat<kColumns>([&](auto j) {
        constexpr int row = decltype(i)::value, column = decltype(j)::value, tile = sum(row, column);
        if (add) return load_tile<tile>(from + row * kTileRows * stride + column * kTileBytes, stride);
        zero_tile<tile>();
      });
    });
  }

  // One step of the depth.
  static inline void step(const char* a, int64_t a_stride, const char* b, int64_t b_stride) {
    repeat<kRows>([&](auto i) {
      load_tile<left(decltype(i)::value)>(a + decltype(i)::value * kTileRows * a_stride, a_stride);
    });
    repeat<kColumns>([&](auto j) {
      constexpr int column = decltype(j)::value;
      load_tile<right(column)>(b + column * kTileBytes, b_stride);
      repeat<kRows>([&](auto i) {
        constexpr int row = decltype(i)::value;
        multiply_tiles<sum(row, column), left(row), right(column)>();
      });
    });
  }

  static inline void end(float* sums, int64_t stride) {
    char* to = reinterpret_cast<char*>(sums);
    repeat<kRows>([&](auto i) {
      repeat<kColumns>([&](auto j) {
        constexpr int row = decltype(i)::value, column = decltype(j)::value;
        store_tile<sum(row, column)>(to + row * kTileRows * stride + column * kTileBytes, stride);
      });
    });
  }
};

}  // namespace FUSELORA_ISA
}  // namespace fuselora

#endif
