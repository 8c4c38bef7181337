// What of encoding, decoding and scoring encoded rows depends on the instruction set; one table for each.
#pragma once
#include "encoded/rows.h"

namespace lgk {

// Numbers that encode works on at a time. A block's start is one of a chunk.
constexpr int64_t kChunk = 1024;

struct Rounding {
  bool stochastic;
  uint32_t row;  // the hash of the seed and the row
};

struct EncodedKernels {
  // The scale of a block of n numbers: the largest magnitude over the largest code, or their mean magnitude. scratch
  // holds as many numbers as the least power of 2 from n on.
  float (*scale_of)(const float* x, int64_t n, const Encoding& encoding, bool mean, float* scratch);

  // n <= kChunk numbers of a row from `column` on to codes: the nearest or a random neighbour of x * inverse.
  void (*encode)(const float* x, int64_t n, float inverse, const Encoding& encoding, const Rounding& rounding,
                 int64_t column, uint8_t* codes);

  // Numbers column .. column + n - 1 of a row, column a multiple of 8.
  void (*decode)(const EncodedRows& rows, int64_t row, int64_t column, int64_t n, float* out);

  // sums[i][j][lane] (+)= sum over the columns from `column` on of row + i's numbers times b[j], block by block; b
  // padded by zeros to whole vectors, its `width` a power of 2 up to 8; room for whole kDotRows of sums. Of fp8, and of
  // integers. Null: decode and multiply.
  void (*few_f8)(const EncodedRows& rows, int64_t row, int64_t count, int64_t column, int64_t columns, const float* b,
                 int64_t ldb, int64_t width, float* sums, bool add);
  decltype(few_f8) few_codes;
};

// The table for the instruction set in use.
const EncodedKernels& encoded_kernels();

uint16_t half_of(float x);
float float_of_half(uint16_t bits);

// The scale of a row's block as fp32.
inline float scale_at(const EncodedRows& rows, int64_t row, int64_t block) {
  const int64_t i = row * rows.scale_stride + block;
  return rows.encoding.half_scales ? float_of_half(static_cast<const uint16_t*>(rows.scales)[i])
                                   : static_cast<const float*>(rows.scales)[i];
}

}  // namespace lgk
