// Products of rows with few columns, at the speed of memory.
#pragma once
#include "common/product.h"

namespace lgk {

// multiply_rows for 1 <= n <= kFew. Each row of a is read once, from where it lies.
template <typename T>
void multiply_few(const Rows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<T> c, int n_threads);

}  // namespace lgk
