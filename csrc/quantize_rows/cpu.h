// codes[n, d], scales[n, b]: number = scale * code, block by block of each row; see encoded/rows.h.
//
// scale = max |g| / (the largest code), or for the nearest sign mean |g|, rounded to the scales' dtype;
// code = g * (1 / scale), rounded to the nearest code, ties to even, or to one of both neighbours by chance. A scale
// below 2^-126 is 0, with codes of 0; that of a block with NaN or Inf is NaN.
#pragma once
#include "common/rows.h"
#include "encoded/rows.h"

namespace lgk::quantize_rows {

struct Shape {
  int64_t rows, d;
};

struct Chance {
  bool stochastic;
  int64_t seed, first_row;  // a number's chance depends on the seed, its row from first_row on, and its column
};

// g [rows, d] of fp32, bf16 or fp16; codes [rows, bytes] and scales [rows, blocks] contiguous. False if a scale is NaN.
bool quantize_rows(const Rows& g, const Encoding& encoding, const Chance& chance, uint8_t* codes, void* scales,
                   Shape shape, int n_threads);

}  // namespace lgk::quantize_rows
