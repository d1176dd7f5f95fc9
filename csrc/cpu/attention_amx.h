// Attention's products on AMX tiles, in place of attention_tile.h's for vdpbf16ps: the same operands as they lie.
//
// What is left of the depth behind whole steps of sixteen words is a step of tiles with fewer columns on the left and
// fewer rows on the right, so nothing behind an operand's end is read or multiplied; so are the last rows.
#pragma once

#include "cpu/tile_block.h"
#include "cpu/vec.h"

#if defined(FUSELORA_TILES)

namespace fuselora {
namespace FUSELORA_ISA {

// What the blocks of a product share: some steps of the depth, each of as many words as the tiles have pairs.
struct TileSteps {
  int64_t steps;
  const bf16* a;
  int64_t lda;  // elements
  const float* b;
  int64_t ldb;  // words
  float* c;
  int64_t ldc;
  bool add;
};

template <int kRows, int kColumns>
static void block_of_tiles(const TileSteps& t, int64_t row, int64_t vec) {
  using Block = TileBlock<kRows, kColumns>;
  constexpr int64_t word = sizeof(float);
  const char* a = reinterpret_cast<const char*>(t.a + row * t.lda);
  const char* b = reinterpret_cast<const char*>(t.b + vec * kLanes);
  float* c = t.c + row * t.ldc + vec * kLanes;
  Block::begin(c, t.ldc * word, t.add);
  for (int64_t step = 0; step < t.steps; ++step, a += kTileBytes, b += kTilePairs * t.ldb * word)
    Block::step(a, t.lda * int64_t(sizeof(bf16)), b, t.ldb * word);
  Block::end(c, t.ldc * word);
}

template <int kRows, int kColumns>
static void columns_of_tiles(const TileSteps& t, int64_t row, int64_t vecs, int64_t vec = 0) {
  for (; vec + kColumns <= vecs; vec += kColumns) block_of_tiles<kRows, kColumns>(t, row, vec);
  if constexpr (kColumns > 1) columns_of_tiles<kRows, kColumns - 1>(t, row, vecs, vec);
}

static void rows_of_tiles(const TileSteps& t, int64_t m, int64_t vecs, int64_t pairs) {
  for (int64_t row = 0; row < m; row += kTileBlockRows) {
    const int64_t rows = m - row < kTileBlockRows ? m - row : kTileBlockRows;
    shape_tiles(rows, pairs);
    rows > kTileRows ? columns_of_tiles<2, 2>(t, row, vecs) : columns_of_tiles<1, 4>(t, row, vecs);
  }
}

// c [m, 16 vecs] = a [m, depth words] b [depth words, 16 vecs], added to c, or to c times a factor for each column. An
// instruction sums sixteen words from zero before it adds them, so c may hold the sums so far.
static void tile_product(int64_t m, int64_t vecs, int64_t depth, const bf16* a, int64_t lda, const float* b, int64_t ldb,
                         float* c, int64_t ldc, bool add, const float* factor) {
  for (int64_t i = 0; factor && i < m; ++i)
    for (int64_t j = 0; j < vecs * kLanes; j += kLanes)
      store(c + i * ldc + j, load(c + i * ldc + j, Full{}) * load(factor + j, Full{}), Full{});
  const int64_t whole = depth / kTilePairs, rest = depth % kTilePairs, k = whole * kTilePairs;
  if (whole) rows_of_tiles({whole, a, lda, b, ldb, c, ldc, add}, m, vecs, kTilePairs);
  if (rest) rows_of_tiles({1, a + 2 * k, lda, b + k * ldb, ldb, c, ldc, whole || add}, m, vecs, rest);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora

#endif
