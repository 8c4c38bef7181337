// A[n,t] = P x[n,t]. Order of summation over d: see common/product.h.
#pragma once
#include "common/rows.h"

namespace lgk::project_rows {

struct Shape {
  int64_t rows, d, k;
};

// x [rows, d], maybe `rounded` beside a p in bf16; p [k, d]; out [rows, k] contiguous. T is float, or double when x and
// p are fp64.
template <typename T>
void project_rows(const Rows& x, const Rows& p, T* out, Shape shape, int n_threads);

// The same of fp32 sums, rounded to bf16.
void project_rows_rounded(const Rows& x, const Rows& p, uint16_t* out, Shape shape, int n_threads);

}  // namespace lgk::project_rows
