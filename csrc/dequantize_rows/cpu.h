// out[n, d] = scale * code, one fp32 product a number.
#pragma once
#include "encoded/rows.h"

namespace lgk::dequantize_rows {

struct Shape {
  int64_t rows, d;
};

// out [rows, d] contiguous.
void dequantize_rows(const EncodedRows& rows, float* out, Shape shape, int n_threads);

}  // namespace lgk::dequantize_rows
