// Products of few terms with one rounding: out = alpha * sum_t A_t B_t + bias, formulas in kernels/native_gemm.py.
//
// Threads share blocks of rows times up to 64 columns. For each, the right operands are packed into a panel in the L2
// cache, a segment of the terms' joint depth at a time; tiles of 6 x 64 sums (4 x 16 to 24 x 16 at other widths, in AMX's
// registers 32 x 32) read the left operands as they lie. Between segments the sums of a block rest in fp32. Segments are
// a function of the terms' depths alone, and every sum is over ascending k, so results don't depend on the number of
// threads.
//
// Two things keep the multipliers from waiting for memory. While a segment is multiplied, the next one's right operand
// is fetched into the L2 cache. And where the depth is large, as in the input gradient of a head, a thread takes a
// segment of four panels before it goes on to the next: the left operand's segment stays in cache, and the right one's
// rows are read in pieces of 512 bytes instead of 128.
#include "cpu/gemm_amx.h"
#include "cpu/gemm_few_rows.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fuselora {
namespace FUSELORA_ISA {
namespace {

// Depth of a segment, whose sums are added to those before it. Pairs: 160 KB of panel, so that the sums' 256 KB fit beside
// it in an L2 cache of 512 KB or more. fp32: rounding grows with the square root of the longest chain of additions, and
// at 640 it was four times that of MKL, which is blocked too; 128 costs 3 % of the time. Tiles: half a panel in the L1
// cache, see gemm_amx.h.
template <class Dot>
constexpr int64_t kSegment = 128;
#if defined(__AVX512BF16__)
template <>
constexpr int64_t kSegment<Bf16Dot> = 1280;
#endif
#if defined(FUSELORA_TILES)
template <>
constexpr int64_t kSegment<TileDot> = 512;
#endif
// Pairs whose sums are the result, in fp32 (the adapters' gradients), obey the same rule: at 640 over the rows their error
// was five times that of MKL. 256 also keeps the panel in the L1 cache and takes 5 to 18 % less time.
constexpr int64_t kExactSegment = 256;
// Blocks have a multiple of so many rows, and a step of the depth so many of a panel's rows.
template <class Dot>
constexpr int64_t kRowStep = kSums;
template <class Dot>
constexpr int64_t kStepRows = 1;
#if defined(FUSELORA_TILES)
template <>
constexpr int64_t kRowStep<TileDot> = kTileBlockRows;
template <>
constexpr int64_t kStepRows<TileDot> = kTilePairs;
#endif
constexpr int64_t kDeep = 8192;  // from which depth on panels are taken in groups
constexpr int64_t kCut = 64;  // where a term is cut: a multiple of this from its beginning

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T>
constexpr int32_t kDtype = FUSELORA_F32;
template <>
constexpr int32_t kDtype<bf16> = FUSELORA_BF16;
template <>
constexpr int32_t kDtype<fp16> = FUSELORA_F16;

template <class T, class S, class Use>
void use_scaled(const GemmTerm& term, Use use) {
  use(Scaled<T, S>{static_cast<const S*>(term.b), term.b_stride, splat(float(term.scale)), term.rest != 0});
}

// use(source) with the term's right operand.
template <class T, class Use>
void with_source(const GemmTerm& term, Use use) {
  if (term.quantized) {
    const fuselora_weight_4bit& q = *term.quantized;
    return use(Quantized<T>({q.data, q.absmax, q.code, q.absmax2, q.code2, q.offset, q.blocksize, q.blocksize2},
                            term.b_stride));
  }
  if (term.b_dtype == kDtype<T> && term.scale == 1.0 && !term.rest)
    return use(Dense<T>{static_cast<const T*>(term.b), term.b_stride});
  if (term.b_dtype == FUSELORA_BF16) return use_scaled<T, bf16>(term, use);
  if (term.b_dtype == FUSELORA_F16) return use_scaled<T, fp16>(term, use);
  use_scaled<T, float>(term, use);
}

template <class Dot>
int64_t longest_segment(const Gemm& g) {
  return g.out_dtype == FUSELORA_F32 && kSegment<Dot> > kExactSegment ? kExactSegment : kSegment<Dot>;
}

// How the work is divided.
struct Plan {
  int64_t panels, group, groups, blocks, block_rows, segment;
  bool rests;  // whether sums rest in memory between segments or before they are written
  int threads;
};

template <class Dot>
Plan plan(const Gemm& g) {
  int64_t depth = 0;
  for (int i = 0; i < g.count; ++i) depth += g.terms[i].k;
  Plan p;
  const int64_t most = longest_segment<Dot>(g), segments = depth > most ? (depth - 1) / most + 1 : 1;
  p.segment = round_up((depth + segments - 1) / segments, kCut);
  p.threads = team(g.m * g.n * depth / 64, g.threads);
  p.panels = (g.n + kPanelColumns - 1) / kPanelColumns;
  p.group = depth < kDeep ? 1 : (p.panels - 1) / (2 * p.threads) + 1;
  if (p.group > kGemmGroup) p.group = kGemmGroup;
  p.rests = segments > 1 || g.count > kStretches || g.out_col != 1;
  p.groups = (p.panels - 1) / p.group + 1;
  const int64_t wanted = (2 * p.threads - 1) / p.groups + 1;
  const int64_t least = (g.m + kGemmRows - 1) / kGemmRows;
  p.block_rows = round_up((g.m - 1) / (least > wanted || p.threads == 1 ? least : wanted) + 1, kRowStep<Dot>);
  p.blocks = (g.m - 1) / p.block_rows + 1;
  return p;
}

// Where a block is in the terms: the next k of the next term.
struct Cursor {
  int term = 0;
  int64_t k = 0;
};

// Packs the next segment and says which stretches of the left operands meet it.
template <class T, class Dot>
void next_segment(const Gemm& g, const Plan& p, int64_t row, Part part, typename Dot::Panel* panel, Cursor& at,
                  Stretch<T>* stretches, int& count) {
  int64_t room = p.segment;
  for (count = 0; count < kStretches && at.term < g.count; ++count) {
    const GemmTerm& term = g.terms[at.term];
    const int64_t left = term.k - at.k, depth = left <= room ? left : room / kCut * kCut;
    if (depth == 0) break;
    part.k0 = at.k;
    part.depth = depth;
    if constexpr (kStepRows<Dot> > 1) {  // what the last step has no k for is zero
      const int64_t there = depth / kPair, rows = round_up(depth, Dot::kDepth) / kPair;
      std::memset(panel + there * part.width, 0, size_t((rows - there) * part.width) * sizeof *panel);
    }
    with_source<T>(term, [&](const auto& source) {
      if (term.b_by_rows) return pack_by_rows(source, part, panel);
      pack_by_columns(source, part, panel);
    });
    panel += (depth + Dot::kDepth - 1) / Dot::kDepth * kStepRows<Dot> * part.width;
    const T* a = static_cast<const T*>(term.a) + row * term.a_row + at.k;
    stretches[count] = {a, term.a_row, depth};
    room -= depth;
    at.k += depth;
    if (at.k == term.k) at = {at.term + 1, 0};
  }
}

template <class T>
void scatter(const Gemm& g, const float* sums, int64_t row, int64_t rows, const Part& part) {
  T* out = static_cast<T*>(g.out) + row * g.out_row + part.j0 * g.out_col;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < part.count; ++j) {
      T number[kLanes];
      store(number, splat(sums[i * part.width + j]), Full{});
      out[i * g.out_row + j * g.out_col] = number[0];
    }
}

void scatter_as(int32_t dtype, const Gemm& g, const float* sums, int64_t row, int64_t rows, const Part& part) {
  if (dtype == FUSELORA_BF16) return scatter<bf16>(g, sums, row, rows, part);
  if (dtype == FUSELORA_F16) return scatter<fp16>(g, sums, row, rows, part);
  scatter<float>(g, sums, row, rows, part);
}

// What the segment at `at` of a panel reads, in lines for the tiles of a segment of so many rows.
Ahead ahead_of(const Gemm& g, const Plan& p, const Cursor& at, int64_t panel, int64_t rows) {
  Ahead a;
  const int64_t j0 = panel * kPanelColumns;
  if (at.term >= g.count || j0 >= g.n) return a;
  const GemmTerm& term = g.terms[at.term];
  const int64_t depth = term.k - at.k < p.segment ? term.k - at.k : p.segment;
  const int64_t count = g.n - j0 < kPanelColumns ? g.n - j0 : kPanelColumns;
  const int64_t row = term.b_by_rows ? at.k : j0, column = term.b_by_rows ? j0 : at.k;
  const auto bytes = [&](int64_t elements) {
    return term.quantized ? elements / 2 : elements * (term.b_dtype == FUSELORA_F32 ? 4 : 2);
  };
  const void* b = term.quantized ? term.quantized->data : term.b;
  a.stride = bytes(term.b_stride);
  a.data = static_cast<const char*>(b) + row * a.stride + bytes(column);
  a.rows = term.b_by_rows ? depth : count;
  a.bytes = bytes(term.b_by_rows ? count : depth);
  const int64_t fetches = (rows * kMaxVecs / kSums + 1) * (p.segment / kFetchDepth + 1);
  a.lines = (a.rows * ((a.bytes - 1) / Ahead::kLine + 1) - 1) / fetches + 1;
  return a;
}

// A thread's memory, and the columns of a panel.
template <class Dot>
struct Place {
  float* bias;
  typename Dot::Panel* panel;
  float* sums;
  int64_t j0, count, width;
  Place(const Gemm& g, int64_t panel_index, char* memory)
      : bias(reinterpret_cast<float*>(memory)),
        panel(reinterpret_cast<typename Dot::Panel*>(memory + kGemmBiasBytes)),
        sums(reinterpret_cast<float*>(memory + kGemmBiasBytes + kGemmPanelBytes)),
        j0(panel_index * kPanelColumns),
        count(g.n - j0 < kPanelColumns ? g.n - j0 : kPanelColumns),
        width(round_up(count, kLanes)) {
  const auto* given = static_cast<const typename Dot::Left*>(g.bias);
    for (int64_t j = 0; j < width; j += kLanes)
      store(bias + j, given && j < count ? load_some(given + j0 + j, count - j) : splat(0), Full{});
  }
  Tile<Dot> tile(const Gemm& g, int64_t row, bool rests) const {
    const int64_t bytes = g.out_dtype == FUSELORA_F32 ? 4 : 2;
    char* out = static_cast<char*>(g.out) + (row * g.out_row + j0) * bytes;
    const bool direct = g.out_col == 1 && g.out_dtype == kDtype<typename Dot::Left> && count == width;
    return {nullptr, 0,       panel,  sums,  rests,       true,   false,  g.alpha, bias,
            g.out_col == 1 ? out : nullptr, g.out_row, count, g.out_dtype, direct, nullptr};
  }
};

// One block of rows times a group of panels of columns. memory: [kGemmWorkspace] bytes.
template <class T, class Dot>
void block(const Gemm& g, const Plan& p, int64_t task, char* memory) {
  const int64_t begin = task % p.groups * p.group, end = begin + p.group < p.panels ? begin + p.group : p.panels;
  const int64_t row = task / p.groups * p.block_rows;
  const int64_t rows = g.m - row < p.block_rows ? g.m - row : p.block_rows;
  Stretch<T> stretches[kStretches];
  for (Cursor at, next; at.term < g.count; at = next)
    for (int64_t index = begin; index < end; ++index) {
      const Place<Dot> place(g, index, memory);
      const Part part{0, 0, place.j0, place.count, place.width};
      Tile<Dot> tile = place.tile(g, row, p.rests);
      tile.stretches = stretches;
      tile.sums += (index - begin) * p.block_rows * kPanelColumns;
      tile.first = at.term == 0 && at.k == 0;
      next = at;
      next_segment<T, Dot>(g, p, row, part, place.panel, next, stretches, tile.count);
      tile.last = next.term == g.count;
      // Behind the group's last panel its first one follows; behind a task most likely the one `threads` further on.
      Ahead ahead = index + 1 < end ? ahead_of(g, p, at, index + 1, rows)
                    : tile.last     ? ahead_of(g, p, Cursor(), (task + p.threads) % p.groups * p.group, rows)
                                    : ahead_of(g, p, next, begin, rows);
      tile.ahead = &ahead;
      tiles_of_width(tile, part.width, rows);
      if (tile.last && g.out_col != 1) scatter_as(g.out_dtype, g, tile.sums, row, rows, part);
    }
}

// All rows, of which there are few, times one panel's columns, without a panel.
template <class T, class Dot, class Along>
void block_of_few_rows(const Gemm& g, int64_t index, char* memory) {
  const Place<Dot> place(g, index, memory);
  std::memset(place.sums, 0, size_t(g.m * place.width) * sizeof(float));
  for (int i = 0; i < g.count; ++i) {
    const GemmTerm& term = g.terms[i];
    const Dense<T> left{static_cast<const T*>(term.a), term.a_row};
    with_source<T>(term, [&](const auto& source) {
      few_rows<Along>(left, g.m, term.k, source, place.j0, place.count, place.sums, place.width);
    });
  }
  Tile<Dot> tile = place.tile(g, 0, true);  // of no depth: it reads the sums and writes the result
  tile.first = false, tile.last = true;
  tiles_of_width(tile, place.width, g.m);
}

// Whether block_of_few_rows is to compute this.
bool along_depth(const Gemm& g) {
  bool along = g.m <= kFewRows && g.out_col == 1 && g.terms[0].quantized;
  for (int i = 0; i < g.count; ++i) along = along && !g.terms[i].b_by_rows;
  return along;
}

template <class T, class Dot, class Along>
void product(const Gemm& g) {
  Plan p = plan<Dot>(g);
  const bool few = along_depth(g);
  const int64_t tasks = few ? p.panels : p.groups * p.blocks;
#pragma omp parallel for num_threads(p.threads) if (p.threads > 1) schedule(dynamic)
  for (int64_t index = 0; index < tasks; ++index) {
#if defined(_OPENMP)
    char* memory = g.workspace + omp_get_thread_num() * kGemmWorkspace;
#else
    char* memory = g.workspace;
#endif
    if (few) {
      block_of_few_rows<T, Dot, Along>(g, index, memory);
    } else {
      block<T, Dot>(g, p, index, memory);
    }
  }
}

}  // namespace

void gemm(const Gemm& g) {
  if (g.dtype == FUSELORA_F32) return product<float, Fma<float>, FmaAlong<float>>(g);
  if (g.dtype == FUSELORA_F16) return product<fp16, Fma<fp16>, FmaAlong<fp16>>(g);
#if defined(FUSELORA_TILES)
  product<bf16, TileDot, Bf16Along>(g);
#elif defined(__AVX512BF16__)
  product<bf16, Bf16Dot, Bf16Along>(g);
#else
  product<bf16, Fma<bf16>, FmaAlong<bf16>>(g);
#endif
}

}  // namespace FUSELORA_ISA
}  // namespace fuselora
