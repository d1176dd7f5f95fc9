// 4-bit weights on a GPU: their scales, and dequantisation in one launch. Formulas and layout: kernels/nf4.py.
//
// A warp takes a tile of kSteps * 32 pieces. A piece is what one lane stores at once, 16 bytes: 8 weights of two bytes
// or 4 of four. In every step the lanes of a warp take neighbouring pieces, so a step reads one run of 128 (or 64) bytes
// and writes one run of 512. Sixteen-byte loads would give every lane 32 neighbouring weights, and a store of the warp
// would half fill each of its 32-byte sectors; there are four times as many bytes to store as to load.
//
// Lane i holds code[i % 16], and a nibble finds its value by a warp shuffle, which ignores the higher bits of its index:
// 4.4 instructions per weight on sm_90, where a table in shared memory, with its masks and addresses, takes 6.6, and
// byte permutations for the four bytes of a value 8.6. Scales: lane i computes that of the tile's block i, with blocks
// of 64 one each, and shuffles hand them out.
//
// Instructions per weight of two bytes, counted before compiling: shift 7/8, shuffle 1, product 1, half of a conversion;
// per lane and tile of 64 weights: loads 8, stores 8, scales 8 + 20, loop 12; together 4.25. Of four bytes, tiles of 32
// weights per lane: shift 3/4, shuffle 1, product 1, and 56 / 32; together 4.5. Compiled for sm_90: 4.36 and 4.75.
#pragma once
#include <cstdint>
#include <type_traits>

namespace fuselora {

// The tensors of one weight. absmax2, code2 and offset: NULL where absmax is fp32.
struct Weight4bit {
  const uint8_t* data;
  const void* absmax;
  const float* code;
  const float* absmax2;
  const float* code2;
  const float* offset;
  int32_t log_blocksize;
  int64_t blocksize2;
  int32_t log_blocksize2;  // -1: blocksize2 is no power of two
};

struct Dequantize {
  void* out;
  Weight4bit w;
  int64_t n;
  // Set by plan():
  int64_t tiles;
  int32_t tile_blocks;  // thread blocks that share the tiles; those behind them share the ragged rest
};

constexpr int kThreads = 256, kWarps = kThreads / 32;
template <class T>
constexpr int kPiece = 16 / sizeof(T);
template <class T>
__host__ __device__ constexpr int tile_size(int steps) { return 32 * kPiece<T> * steps; }

// Divides the work and returns the number of thread blocks, about max_blocks at most. Tiles need aligned pointers, and a
// shift to find an outer block; without either everything is ragged.
template <class T>
int64_t plan(Dequantize& a, int steps, int64_t max_blocks) {
  const auto aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const auto blocks = [&](int64_t work, int64_t per_block) {
    const int64_t needed = (work + per_block - 1) / per_block;
    return needed < max_blocks ? needed : max_blocks;
  };
  const int tile = tile_size<T>(steps);
  const bool tiled = aligned(a.out, 16) && aligned(a.w.data, kPiece<T> / 2) && a.w.log_blocksize2 >= 0;
  a.tiles = tiled ? a.n / tile : 0;
  a.tile_blocks = int32_t(blocks(a.tiles, kWarps));
  return a.tile_blocks + blocks(a.n - a.tiles * tile, 2 * kThreads);
}

// The even element of a byte is its high nibble.
__host__ __device__ constexpr int nibble_shift(int element) { return 4 * (element ^ 1); }

__device__ __forceinline__ float block_scale(const Weight4bit& w, int64_t block, int64_t group, float offset) {
  if (w.absmax2 == nullptr) return static_cast<const float*>(w.absmax)[block];
  return add(multiply(w.code2[static_cast<const uint8_t*>(w.absmax)[block]], w.absmax2[group]), offset);
}

__device__ __forceinline__ float load_offset(const Weight4bit& w) { return w.absmax2 == nullptr ? 0.f : *w.offset; }

// Elements [begin, n), two per thread, for any alignment and any blocksize2. begin is even.
template <class T>
__device__ void dequantize_ragged(const Dequantize& a, int64_t begin, int64_t thread, int64_t threads) {
  const float offset = load_offset(a.w);
  T* out = static_cast<T*>(a.out);
  for (int64_t i = begin + 2 * thread; i < a.n; i += 2 * threads) {
    const uint32_t byte = a.w.data[i >> 1];
    const int64_t block = i >> a.w.log_blocksize;
    const float scale = block_scale(a.w, block, block / a.w.blocksize2, offset);
    out[i] = narrow<T>(multiply(a.w.code[byte >> 4], scale));
    if (i + 1 < a.n) out[i + 1] = narrow<T>(multiply(a.w.code[byte & 15], scale));
  }
}

// The values of one piece, rounded to T: 16 bytes.
template <class T, class Codes>
__device__ __forceinline__ uint4 dequantize_piece(Codes codes, float table, float scale) {
  float x[kPiece<T>];
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j)
    x[j] = multiply(shuffle<16>(table, int(uint32_t(codes) >> nibble_shift(j))), scale);
  if constexpr (sizeof(T) == 4)
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  else
    return {narrow_pair<T>(x[0], x[1]), narrow_pair<T>(x[2], x[3]), narrow_pair<T>(x[4], x[5]),
            narrow_pair<T>(x[6], x[7])};
}

// kSteps: such that a tile has at most 32 blocks, one per lane.
template <class T, int kSteps>
__global__ void __launch_bounds__(kThreads) dequantize_4bit(const Dequantize a) {
  constexpr int kTile = tile_size<T>(kSteps);
  using Codes = std::conditional_t<sizeof(T) == 2, uint32_t, uint16_t>;
  if (blockIdx.x >= unsigned(a.tile_blocks)) {
    const int64_t first = (int64_t(blockIdx.x) - a.tile_blocks) * kThreads + threadIdx.x;
    return dequantize_ragged<T>(a, a.tiles * kTile, first, int64_t(gridDim.x - unsigned(a.tile_blocks)) * kThreads);
  }
  const int lane = threadIdx.x % 32, shift = a.w.log_blocksize;
  const int last = kTile >> shift ? (kTile >> shift) - 1 : 0;  // block of a tile
  const int own = lane < last ? lane : last;
  const float table = a.w.code[lane % 16], offset = load_offset(a.w);
  for (int64_t tile = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; tile < a.tiles; tile += a.tile_blocks * kWarps) {
    const int64_t begin = tile * kTile, block = (begin >> shift) + own;
    const Codes* codes_at = reinterpret_cast<const Codes*>(a.w.data + begin / 2) + lane;
    uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(a.out) + begin) + lane;
    Codes codes[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) codes[step] = load_once(codes_at + 32 * step);
    const float scales = block_scale(a.w, block, block >> a.w.log_blocksize2, offset);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float scale = shuffle<32>(scales, ((32 * step + lane) * kPiece<T>) >> shift);
      out[32 * step] = dequantize_piece<T>(codes[step], table, scale);
    }
  }
}

}  // namespace fuselora
