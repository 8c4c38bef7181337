// Products of two sets of rows: what project_rows, score_block and score_topk have in common.
#pragma once
#include <memory>

#include "common/buffer.h"
#include "common/rows.h"

namespace lgk {

template <typename T>
struct Output {
  T* data;
  int64_t row_stride, column_stride;
  uint16_t* rounded = nullptr;  // where results go instead, in bf16
};

// c[i][j] = sum_k a[i][k] b[j][k] for i < m, j < n, k < depth; sizes 0 are allowed and a sum of nothing is 0.
//
// Order of summation, n > few of the dtypes' Products: panels of kPanel terms (two bf16 operands on a machine that
// multiplies bf16: pairs), each a chain; the sums of kPanelsPerRun panels are added in order, and then the sums of
// these runs. n <= few: lane l of a vector sums the terms (or pairs) l modulo lanes, in chains of kDotChain that are
// added in order; then the lanes are added. Neither m nor the thread count changes the bits of a result, and n only by
// whether it exceeds few.
template <typename T>
void multiply_rows(const Rows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<T> c, int n_threads);

// The same, rounded to bf16: c [m, n].
void multiply_rows_rounded(const Rows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, uint16_t* c,
                           int n_threads);

// b's rows 0 .. n - 1 for products with any number of blocks of rows. They are laid out once, unless they are more than
// multiply_rows lays out at a time; b is read by multiply too.
template <typename T>
class LaidOut {
 public:
  // a: the dtype of the rows to come; others are multiplied too, without what is laid out.
  LaidOut(const Rows& b, int64_t n, int64_t depth, Dtype a, int n_threads);

  // multiply_rows by b's rows first .. first + n - 1.
  void multiply(const Rows& a, int64_t m, int64_t first, int64_t n, Output<T> c, int n_threads) const;

 private:
  Rows b_;
  int64_t n_, depth_;
  Dtype a_;
  std::unique_ptr<Buffer<T>> laid_out_;
};

}  // namespace lgk
