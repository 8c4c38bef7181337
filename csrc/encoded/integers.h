// Products of integer codes with queries in fixed point, exact within a block; for machines that multiply bytes.
//
// A query's numbers q become, block by block, the nearest of n * u with a whole n in `digits` signed bytes; codes are
// unsigned bytes, offset by the format's constant. A unit is kUnit numbers in the order in which a format's codes
// expand; a span of units shares its scales and one 32-bit sum a lane.
#pragma once
#include "encoded/rows.h"

namespace lgk {

constexpr int64_t kUnit = 128;
constexpr int64_t kMostSpan = 512;    // numbers; a lane's sum stays below 2^24, which fp32 holds
constexpr int64_t kTileCodes = 12;    // rows of a tile
constexpr int64_t kTileQueries = 32;  // columns of a tile
constexpr int64_t kFewRows = 4;       // rows read side by side
constexpr int64_t kLaneSums = 16;     // sums of every fourth group of four numbers
constexpr int64_t kFewQueries = 3;    // columns that few takes at most

struct IntegerKernels {
  // Codes of whole units to unsigned bytes, kUnit a unit. Fetches what lies `ahead` bytes further on.
  void (*expand)(Code code, const uint8_t* codes, int64_t units, int64_t ahead, uint8_t* out);

  // The largest magnitude; NaN or Inf if there is one.
  float (*largest)(const float* x, int64_t n);

  // x [kUnit] * inverse to `digits` bytes a number, low digits first: out[digit][kUnit] in the expanded order. Adds
  // their sums to sums[digit][kLaneSums].
  void (*to_digits)(Code code, const float* x, float inverse, int digits, int8_t* out, int32_t* sums);

  // c[i][j] += a_scale[i] b_scale[j] (start[j] + sum a(i, k) b(j, k)) over units of one span. a: rows lda apart; b
  // [units][kUnit / 4][kTileQueries][4].
  void (*tile)(const uint8_t* a, int64_t lda, const int8_t* b, int64_t units, const int32_t* start,
               const float* a_scale, const float* b_scale, float* c, int64_t ldc);

  // sums[i][j] = the same over all spans, for kFewRows rows of codes as they lie and `columns` columns. The last unit
  // is read from `last`. a_scale [spans][kFewRows]; b [units][columns][kUnit]; b_scale [spans]
  // [columns]; start [spans][columns][kLaneSums]
  void (*few)(Code code, const uint8_t* const* rows, const uint8_t* const* last, int64_t units, int64_t units_per_span,
              const float* a_scale, const int8_t* b, const int32_t* start, const float* b_scale, int64_t columns,
              float* sums);
};

// Null where the instruction set in use has none.
const IntegerKernels* integer_kernels();

// What is added to a code to make it an unsigned byte.
inline int32_t offset_of(Code code) {
  return code == Code::kI8 ? 128 : code == Code::kI4 ? 8 : code == Code::kI2 ? 2 : 1;
}

}  // namespace lgk
