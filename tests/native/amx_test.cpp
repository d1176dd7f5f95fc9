// The emulated tiles against the instruction's definition, written down once more one number at a time; and the answers
// to a process that asks Linux for tiles.
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#define FUSELORA_ISA amx_emulated
#define FUSELORA_AMX_EMULATED
#include "cpu/amx_permission.h"
#include "cpu/tile_block.h"

using namespace fuselora::amx_emulated;

namespace {

int failures = 0;

#define EXPECT(condition)                                             \
  do {                                                                \
    if (!(condition)) {                                               \
      std::printf("%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                     \
    }                                                                 \
  } while (0)

uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
float widened(uint16_t half) {
  const uint32_t u = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }

uint32_t seed = 1;
uint32_t draw() { return seed = seed * 1664525u + 1013904223u; }

// bf16 numbers of all sizes that keep products finite, subnormals and zeros among them.
uint16_t draw_half() {
  const uint32_t kind = draw() >> 28, sign = draw() >> 31 << 15, low = draw() >> 25;
  if (kind == 0) return uint16_t(sign | low);                                  // subnormal
  if (kind < 3) return uint16_t(sign | (1 + (draw() >> 28)) << 7 | low);       // next to it
  return uint16_t(sign | (127 - 8 + (draw() >> 28)) << 7 | low);
}

constexpr int kRight = 72;  // numbers between rows of the right operand

// sum += left right for one sum: even and odd products apart, each from zero and upwards.
float definition(float sum, const uint16_t* left, const uint16_t* right, int pairs) {
  float part[2] = {};
  for (int k = 0; k < pairs; ++k)
    for (int h = 0; h < 2; ++h)
      part[h] = flushed(std::fma(flushed(widened(left[2 * k + h])), flushed(widened(right[kRight * k + h])), part[h]));
  return flushed(flushed(sum) + flushed(part[0] + part[1]));
}

// The caller's rounding mode neither matters nor changes.
void test_definition(int rows, int pairs, int rounding = FE_TONEAREST) {
  uint16_t left[32][48], right[16][kRight];
  float sums[32][40], before[32][40];
  for (auto& row : left)
    for (auto& x : row) x = draw_half();
  for (auto& row : right)
    for (auto& x : row) x = draw_half();
  for (int i = 0; i < 32; ++i)
    for (int j = 0; j < 40; ++j) before[i][j] = sums[i][j] = widened(draw_half()) * 1.0078125f;
  std::fesetround(rounding);
  {
    const TileScope scope;
    shape_tiles(rows, pairs);
    const auto run = [&](auto block) {
      using Block = decltype(block);
      Block::begin(sums[0], sizeof sums[0], true);
      Block::step(reinterpret_cast<const char*>(left), sizeof left[0], reinterpret_cast<const char*>(right),
                  sizeof right[0]);
      Block::end(sums[0], sizeof sums[0]);
    };
    rows > 16 ? run(TileBlock<2, 2>()) : run(TileBlock<1, 2>());
  }
  EXPECT(std::fegetround() == rounding);
  std::fesetround(FE_TONEAREST);
  for (int i = 0; i < 32; ++i)
    for (int j = 0; j < 40; ++j) {
      const bool there = i < rows && j < 32;
      const float expected = there ? definition(before[i][j], left[i], &right[0][2 * j], pairs) : before[i][j];
      EXPECT(bits(sums[i][j]) == bits(expected));
    }
}

int asked = 0;
int given() { return ++asked, 0; }
int refused() { return ++asked, EPERM; }

void test_permission() {
  char note[160] = "";
  EXPECT(!fuselora::may_use_tiles(false, given, note) && asked == 0 && *note == 0);
  EXPECT(fuselora::may_use_tiles(true, given, note) && asked == 1 && *note == 0);
  EXPECT(!fuselora::may_use_tiles(true, refused, note) && asked == 2);
  EXPECT(std::strcmp(note, "amx is not used: the kernel refuses tile registers (arch_prctl: Operation not permitted)") == 0);
  EXPECT(fuselora::cpu_has_amx() || fuselora::request_tiles() != 0);  // no kernel gives out what isn't there
}

}  // namespace

int main() {
  for (const int rows : {1, 7, 16, 17, 31, 32})
    for (const int pairs : {1, 2, 9, 16}) test_definition(rows, pairs);
  test_definition(32, 16, FE_UPWARD);
  test_permission();
  std::printf("emulated tiles: %s\n", failures ? "FAILED" : "passed");
  return failures != 0;
}
