// Products of rows with few columns, at the speed of memory.
#pragma once
#include "common/product.h"

namespace lgk {

// b's rows 0 .. n - 1 as multiply_few reads them, 1 <= n <= kFew.
template <typename T>
Buffer<T> lay_out_few(const Rows& b, int64_t n, int64_t depth);

// multiply_rows by what was laid out. Each row of a is read once, from where it lies.
template <typename T>
void multiply_few(const Rows& a, int64_t m, const T* laid_out, int64_t n, int64_t depth, Output<T> c, int n_threads);

}  // namespace lgk
