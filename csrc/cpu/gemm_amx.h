// The inner loop of a bf16 product on AMX tiles: in place of gemm_tile.h's for vdpbf16ps, on the same panels, whose rows
// are padded with zeros to whole steps of 32 k.
//
// For 32 columns of a panel, all rows are multiplied 32 at a time: the panel's half, 32 KB at a segment's 512 k, stays in
// the L1 cache, the left operand's rows come from the L2 cache at 32 bytes per cycle, where the sums rest as well. A
// segment is summed from zero in the tiles and added as a whole. A row's sums don't depend on which rows it is
// multiplied with.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/tile_block.h"

#if defined(FUSELORA_TILES)

namespace fuselora {
namespace FUSELORA_ISA {

struct TileDot : Bf16Dot {
  static constexpr int kDepth = kTileDepth;
};

// The left operand's last k of a stretch, fewer than a step's, and zeros: to [rows, kTileDepth].
static inline void copy_last(const bf16* left, int64_t stride, int64_t rows, int64_t depth, bf16* to) {
  const uint32_t there = (uint32_t(1) << depth) - 1;
  for (int64_t i = 0; i < rows; ++i)
    _mm512_store_si512(to + i * kTileDepth, _mm512_maskz_loadu_epi16(there, left + i * stride));
}

// alpha * sums + bias of a block to out, or to the sums.
template <int kColumns>
static void finish_block(const Tile<TileDot>& t, float* sums, int64_t width, int64_t row, int rows, int64_t column) {
  constexpr int64_t all = kColumns * kTileColumns;
  const float* bias = t.bias + column;
  if (!t.out) return write_rows(sums, width, t.alpha, bias, sums, width, all, rows);
  const int64_t columns = t.columns - column < all ? t.columns - column : all, at = row * t.out_stride + column;
  if (t.out_dtype == FUSELORA_BF16)
    return write_rows(sums, width, t.alpha, bias, static_cast<bf16*>(t.out) + at, t.out_stride, columns, rows);
  if (t.out_dtype == FUSELORA_F16)
    return write_rows(sums, width, t.alpha, bias, static_cast<fp16*>(t.out) + at, t.out_stride, columns, rows);
  write_rows(sums, width, t.alpha, bias, static_cast<float*>(t.out) + at, t.out_stride, columns, rows);
}

// `rows` rows from row on, times the panel's columns from `column` on.
template <int kRows, int kColumns>
static void block_of_tiles(const Tile<TileDot>& t, int64_t width, int64_t row, int64_t rows, int64_t column) {
  using Block = TileBlock<kRows, kColumns>;
  alignas(64) bf16 last[kTileBlockRows * kTileDepth];
  const int64_t panel_stride = width * int64_t(sizeof(uint32_t));
  float* sums = t.sums + (t.rests ? row * width : 0) + column;
  const char* panel = reinterpret_cast<const char*>(t.panel + column);
  Block::begin(sums, panel_stride, false);
  for (int s = 0; s < t.count; ++s) {
    const int64_t stride = t.stretches[s].stride, depth = t.stretches[s].depth;
    const bf16* left = t.stretches[s].left + row * stride;
    int64_t k = 0;
    for (; k + kTileDepth <= depth; k += kTileDepth, panel += kTilePairs * panel_stride) {
      t.ahead->fetch();
      t.ahead->fetch();  // made for 6 x 64 sums and 64 k at a time: a step is four thirds of that
      Block::step(reinterpret_cast<const char*>(left + k), stride * int64_t(sizeof(bf16)), panel, panel_stride);
    }
    if (k == depth) continue;
    copy_last(left + k, stride, rows, depth - k, last);
    Block::step(reinterpret_cast<const char*>(last), kTileBytes, panel, panel_stride);
    panel += kTilePairs * panel_stride;
  }
  if (t.first) {
    Block::end(sums, panel_stride);
  } else {
    constexpr int64_t all = kColumns * kTileColumns;
    alignas(64) float these[kRows * kTileRows * all];
    Block::end(these, all * int64_t(sizeof(float)));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < all; j += kLanes) {
        float* at = sums + i * width + j;
        store(at, load(at, Full{}) + load(these + i * all + j, Full{}), Full{});
      }
  }
  if (t.last) finish_block<kColumns>(t, sums, width, row, int(rows), column);
}

template <int kRows, int kColumns>
static void columns_of_tiles(const Tile<TileDot>& t, int64_t width, int64_t row, int64_t rows, int64_t column) {
  if constexpr (kColumns > 1) {
    if (width - column < kColumns * kTileColumns)
      return columns_of_tiles<kRows, kColumns - 1>(t, width, row, rows, column);
  }
  block_of_tiles<kRows, kColumns>(t, width, row, rows, column);
}

static void tiles_of_width(const Tile<TileDot>& t, int64_t width, int64_t rows) {
  if (t.count == 0) return finish(t, t.sums, width, 0, int(rows));  // of a product that was summed along the depth
  const TileScope scope;
  const int64_t whole = rows - rows % kTileBlockRows, left = rows - whole;
  if (whole) {
    shape_tiles(kTileBlockRows, kTilePairs);
    for (int64_t column = 0; column < width; column += 2 * kTileColumns)
      for (int64_t row = 0; row < whole; row += kTileBlockRows)
        columns_of_tiles<2, 2>(t, width, row, kTileBlockRows, column);
  }
  if (left == 0) return;
  shape_tiles(left, kTilePairs);
  if (left <= kTileRows) return columns_of_tiles<1, 4>(t, width, whole, left, 0);
  for (int64_t column = 0; column < width; column += 2 * kTileColumns)
    columns_of_tiles<2, 2>(t, width, whole, left, column);
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora

#endif
