// Products of fp8 codes with queries, for machines that multiply bf16 and bytes.
//
// Every code is a bf16 number. A query's number is one too, and a rest: it is 2^-9 of the number at most, so that its
// product may take codes rounded to bytes and the rest in bytes, twice as many at a time as numbers of bf16. Many
// queries are taken so; few have their rests in bf16, since what takes time is to look up the codes.
#pragma once
#include <cmath>
#include <limits>

#include "encoded/integers.h"

namespace lgk {

constexpr int64_t kF8Unit = 3 * kUnit;  // bytes of a unit of a row: as bf16, then as bytes
constexpr int64_t kF8Step = 4;          // numbers of a step: two pairs of bf16, four bytes
constexpr int64_t kF8Steps = kUnit / kF8Step;
constexpr float kMostF8 = 448, kRestUnits = 127 * 0x1p7f;  // of 1, for numbers below 4
constexpr float kF8Rest = kMostF8 / 127.0f / kRestUnits;   // of a product of bytes

// Where a unit of kTileColumns queries has the numbers of its steps, [pair][query][2] of bf16, and their rests,
// [query][4]: the rests after each step's numbers, or after all of them.
struct F8Layout {
  static constexpr int64_t kNumbers = 2 * kF8Step * kTileColumns, kRests = kF8Step * kTileColumns;  // bytes
  int64_t step, rest_step, first_rest, unit;

  constexpr F8Layout(bool apart, bool rests)
      : step(kNumbers + (rests && !apart ? kRests : 0)),
        rest_step(apart ? kRests : step),
        first_rest(apart ? kF8Steps * kNumbers : kNumbers),
        unit(kF8Steps * (kNumbers + (rests ? kRests : 0))) {}
};

// The numbers of a unit lie in this order as pairs of bf16, in their own as bytes.
constexpr int64_t f8_pair(int64_t i) { return i / 32 * 64 + i % 4 * 2 + i / 4 % 4 * 16 + i / 16 % 2 * 8; }

// The bf16 number that a magnitude of e4m3 is.
constexpr uint16_t bf16_of_f8(int size) {
  if (size == 127) return 0x7fc0;
  if (size >= 8) return static_cast<uint16_t>((size << 4) + (120 << 7));
  int exponent = 127 - 9, mantissa = size;  // size * 2^-9
  if (size == 0) return 0;
  while (mantissa >> 1) {
    mantissa >>= 1;
    ++exponent;
  }
  const int top = exponent - (127 - 9);
  return static_cast<uint16_t>((exponent << 7) | ((size - (1 << top)) << (7 - top)));
}

// What a span's numbers are multiplied with, up to `most` in magnitude: all 0, if that is not finite or hardly more.
struct F8Scale {
  bool finite;
  float of_one = 0, inverse = 0;

  F8Scale(float most, bool whole) : finite(std::isfinite(most)) {
    constexpr float kLeast = std::numeric_limits<float>::min();
    if (!finite || (whole ? most / 127.0f < kLeast : most < 4 * kLeast)) return;
    of_one = whole ? most / 127.0f : std::ldexp(1.0f, std::ilogb(most) - 1);  // below 4, and neither is subnormal
    inverse = 1.0f / of_one;
  }
};

struct F8Kernels {
  TileShape shape;
  bool rests_apart;  // in the queries' layout

  // Codes of whole units to out [kF8Unit] each. A byte is 128 + 127 / kMostF8 of the number, rounded.
  void (*expand)(const uint8_t* codes, int64_t units, uint8_t* out);

  // x [kUnit] * inverse as bf16, and what is missing in kRestUnits; `whole`: rounded to integers, with no rests.
  // Returns the sum of the rests.
  int32_t (*split)(const float* x, float inverse, bool whole, uint16_t* numbers, int8_t* rests);

  // c[i][q] += a_scale[i] b_scale[q] sum over units of one span of a(i, k) b(q, k), for shape.rows rows lda apart and
  // kTileColumns queries; b [units] in their layout. start [queries] is added to the sums of bytes. Some of it may be
  // left to the next call, or to `finish`.
  void (*tile)(const uint8_t* a, int64_t lda, const uint8_t* b, bool rests, int64_t units, const int32_t* start,
               const float* a_scale, const float* b_scale, float* c, int64_t ldc, Pending& pending);
  void (*finish)(bool rests, int64_t ldc, Pending& pending);

  // x [kUnit] * inverse as bf16, then, if there are 2 parts, what is missing: out [parts][kUnit] in f8_pair's order.
  // `whole`: rounded to integers.
  void (*part)(const float* x, float inverse, bool whole, int parts, uint16_t* out);

  // IntegerKernels::few with b [units][queries][parts][kUnit] as `part` makes them, and no offset.
  void (*few)(const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* const* a_scale,
              const uint16_t* b, int parts, const float* b_scale, int64_t ldb, int64_t queries, float* sums, bool add);
};

// Null where the instruction set in use has none.
const F8Kernels* f8_kernels();

}  // namespace lgk
