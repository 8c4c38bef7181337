// Products of integer codes with queries in fixed point, exact within a unit or more; for machines that multiply bytes,
// or words.
//
// A query's numbers q become, block by block, the nearest of n * u with a whole n in `digits` signed bytes or in a
// word; codes are unsigned bytes, offset by the format's constant, or words. A unit is kUnit numbers in the order in
// which a format's codes expand; a span of units shares its scales.
#pragma once
#include "encoded/rows.h"

namespace lgk {

constexpr int64_t kUnit = 128;
constexpr int64_t kMostSpan = 512;  // numbers; a 32-bit sum of a span stays below 2^24, which fp32 holds
constexpr int kMostDigits = 2;
constexpr int64_t kTileColumns = 32;        // queries, or their digits, in a tile
constexpr int64_t kFewRows = 4;             // rows read side by side
constexpr int64_t kFewQueries = 4;          // queries that few takes at most
constexpr int64_t kFewLanes = 16;           // sums that a row and a query have
constexpr int64_t kStreamBytes = 20 << 10;  // of digits that stay in the L1 cache beside a stream of rows
constexpr float kFewShare = 0.25f;          // of what few makes of int2 and sign codes

// Units that few takes at a time: a vector of codes, or two.
constexpr int64_t chunk_units(Code code) { return code == Code::kI2 ? 2 : code == Code::kSign ? 4 : 1; }

// Rows that few reads side by side. Fewer streams are faster where a query's digits need not be shared: they are at
// hand, and their products take less time than the rows take to arrive.
constexpr int64_t streams(Code code, int64_t units, int64_t queries, int digits) {
  if (queries > 1 || units * kUnit * digits > kStreamBytes) return kFewRows;
  return code == Code::kI8 || code == Code::kI4 ? 2 : kFewRows;
}

// How rows are cut for products with many queries.
struct TileShape {
  int64_t rows;        // of a tile
  int64_t run_units;   // of a row that are expanded at a time
  int64_t queries;     // that meet rows which are expanded once: a divisor of EncodedQueries::kAtOnce
  int64_t unit_bytes;  // of a row, expanded
};

// Where the machine multiplies whole tiles, a tile's sums are scaled and added while the next one's are made.
struct alignas(64) Pending {
  static constexpr int64_t kSums = 32 * kTileColumns;
  int32_t sums[2][2 * kSums];  // of two tiles in turn, of each up to two kinds
  int64_t turn = 0;
  const float *a_scale, *b_scale;
  float* c = nullptr;  // none is pending
};

struct IntegerTiles {
  TileShape shape;

  // Codes of whole units to what tile takes.
  void (*expand)(Code code, const uint8_t* codes, int64_t units, uint8_t* out);

  // c[i][q] += a_scale[i] b_scale[q] sum over units of one span of a(i, k) b(q, k), for shape.rows rows and
  // kTileColumns / digits queries. a: rows lda apart; b [units][kUnit / 4][digits][queries][4]; start [digits][queries]
  // is what unsigned codes' offset adds to the digits' sums. Some of it may be left to the next call, or to `finish`.
  void (*tile)(const uint8_t* a, int64_t lda, const int8_t* b, int digits, int64_t units, const int32_t* start,
               const float* a_scale, const float* b_scale, float* c, int64_t ldc, Pending& pending);
  void (*finish)(int digits, int64_t ldc, Pending& pending);
};

struct IntegerKernels {
  IntegerTiles many;
  int fewest_digits;  // kMostDigits: a number is a word, and none is kept in less

  // The largest magnitude; NaN or Inf if there is one.
  float (*largest)(const float* x, int64_t n);

  // x [kUnit] * inverse to `digits` bytes a number, low digits first: out[digit][kUnit] in the expanded order, which
  // has the numbers of every byte's first field, then those of the second and so on; and their sums. Or to words, in
  // the order of words' fields, sums[0] being theirs.
  void (*to_digits)(Code code, const float* x, float inverse, int digits, int8_t* out, int32_t* sums);

  // fp16 to fp32.
  void (*widen)(const uint16_t* halves, int64_t n, float* out);

  // sums[i][q][lane] (+)= sum over units u of a_scale[i][u] (b_scale[q][u] sum a(i, k) b(q, k) - b_sum[q][u]), for
  // kFewRows rows of codes as they lie and `queries` of them. Where `last` is given the last chunk is read from there.
  // b [chunks][queries][digits][vectors][64], vector v with the numbers of field_of(v) of a chunk's bytes, or vector
  // [digit][v] with those of field digit * vectors + field_of(v) of its words; b_scale and
  // b_sum are padded to whole vectors of kFewLanes, b_scale is kFewShare of the scale for int2 and sign.
  void (*few)(Code code, const uint8_t* const* rows, const uint8_t* const* last, int64_t units,
              const float* const* a_scale, const int8_t* b, int digits, const float* b_scale, const float* b_sum,
              int64_t ldb, int64_t queries, float* sums, bool add);

  // out[v] = the sum of vector v, kFewLanes numbers; `vectors` is a multiple of kFewRows.
  void (*sum_lanes)(const float* lanes, int64_t vectors, float* out);
};

// Null where the instruction set in use has none.
const IntegerKernels* integer_kernels();

// Of int2 and sign codes the fields that lie four bits apart are multiplied one after the other.
constexpr int64_t field_of(Code code, int64_t v) {
  return code == Code::kI2 ? v / 2 + v % 2 * 2 : code == Code::kSign ? v / 2 + v % 2 * 4 : v;
}

// What is added to a code to make it an unsigned byte.
inline int32_t offset_of(Code code) {
  return code == Code::kI8 ? 128 : code == Code::kI4 ? 8 : code == Code::kI2 ? 2 : 1;
}

}  // namespace lgk
