// S[q,n] = sum_d queries[q,d] rows[n,d]. Order of summation over d: see common/product.h.
#pragma once
#include <memory>

#include "common/rows.h"
#include "encoded/queries.h"
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

// The same, bit by bit, for any number of blocks of encoded rows, all in one format: the queries are laid out once.
// Plain rows have none: there queries are laid out part by part, each while it is in a cache.
class Scorer {
 public:
  Scorer(const Rows& queries, int64_t n_queries, int64_t d) : queries_(queries), n_queries_(n_queries), d_(d) {}

  int64_t queries() const { return n_queries_; }
  int64_t d() const { return d_; }

  // The next `count` rows' scores to out[q * stride + n].
  void score(const EncodedRows& rows, int64_t count, float* out, int64_t stride, int digits, int n_threads);

 private:
  Rows queries_;
  int64_t n_queries_, d_;
  Encoding encoding_ = {};
  int digits_ = 0;
  std::unique_ptr<EncodedQueries> laid_out_;
};

}  // namespace lgk::score_block
