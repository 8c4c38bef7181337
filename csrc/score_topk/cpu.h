// S[q,n] = row_scale[n] sum_d queries[q,d] rows[n,d]; values, indices = the k best of S[q,:], best first.
//
// Order: NaN first, then by score, then by row number. Order of summation over d: see common/product.h; it is that of
// score_block, bit by bit. Memory: a block of rows' scores for a block of queries, and at most 2 max(k, kSlack)
// candidates a query.
#pragma once
#include "common/rows.h"
#include "encoded/rows.h"

namespace lgk::score_topk {

struct Shape {
  int64_t queries, rows, d, k;  // 1 <= k <= rows, or rows == 0
  bool largest;
};

// queries [queries, d], rows [rows, d], row_scale [rows] of T or with a null pointer; values and indices [queries, k]
// contiguous. T is float, or double when the rows are fp64.
template <typename T>
void score_topk(const Rows& queries, const Rows& rows, const Rows& row_scale, T* values, int64_t* indices, Shape shape,
                int n_threads);

// The same on encoded rows; `digits` as in encoded/product.h.
void score_encoded(const Rows& queries, const EncodedRows& rows, const Rows& row_scale, float* values, int64_t* indices,
                   Shape shape, int digits, int n_threads);

}  // namespace lgk::score_topk
