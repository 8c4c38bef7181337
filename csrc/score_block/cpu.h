// S[q,n] = sum_d queries[q,d] rows[n,d]. Order of summation over d: see common/product.h.
#pragma once
#include "common/rows.h"
#include "encoded/rows.h"

namespace lgk::score_block {

struct Shape {
  int64_t queries, rows, d;
};

// queries [queries, d], rows [rows, d]; out [queries, rows] contiguous. T is float, or double when the rows are fp64.
template <typename T>
void score_block(const Rows& queries, const Rows& rows, T* out, Shape shape, int n_threads);

// The same on encoded rows; `digits` as in encoded/product.h.
void score_encoded(const Rows& queries, const EncodedRows& rows, float* out, Shape shape, int digits, int n_threads);

}  // namespace lgk::score_block
