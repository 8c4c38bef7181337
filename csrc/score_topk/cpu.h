// S[q,n] = row_scale[n] sum_d queries[q,d] rows[n,d]; values, indices = the k best of S[q,:], best first.
//
// Order: NaN first, then by score, then by row number. Order of summation over d: see common/product.h; it is that of
// score_block, bit by bit. Memory: a block of rows' scores for a block of queries, and at most 2 max(k, kSlack)
// candidates a query, 2 k of many queries.
#pragma once
#include <algorithm>
#include <memory>

#include "common/product.h"
#include "common/rows.h"
#include "encoded/queries.h"
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

template <typename T>
struct Ranking;

// The same for rows that come block by block in row order, all of numbers that fit fp32 or all in one format.
class Search {
 public:
  // No more than shape.rows rows will come. The queries are read until the last ones have.
  Search(const Rows& queries, Shape shape);
  ~Search();

  const Shape& shape() const { return shape_; }
  int64_t left() const { return shape_.rows - rows_; }
  int64_t found() const { return std::min(shape_.k, rows_); }  // of the k best

  // The next `count` rows and their factors.
  void add(const Rows& rows, int64_t count, const Rows& row_scale, int n_threads);
  void add(const EncodedRows& rows, int64_t count, const Rows& row_scale, int digits, int n_threads);

  // values and indices [queries, found()].
  void write(float* values, int64_t* indices, int n_threads) const;

 private:
  Rows queries_;
  Shape shape_;
  int64_t rows_ = 0;
  Encoding encoding_ = {};
  std::unique_ptr<LaidOut<float>> plain_;     // numbers of one dtype laid out, or
  std::unique_ptr<EncodedQueries> laid_out_;  // for encoded rows
  std::unique_ptr<Ranking<float>> ranking_;
};

}  // namespace lgk::score_topk
