// factors[n] = for each layer the vectors u_1 .. u_rank, v_1 .. v_rank with G[n] ~ sum_c u_c v_c^T of the least squared
// error: u_c = sqrt(sigma_c) times the c-th left singular vector, v_c = sqrt(sigma_c) times the right one, largest
// first.
//
// Subspace iteration of more vectors than rank from a fixed start, and one-sided Jacobi among them: the same number of
// steps for every row, each row by itself, so that bits depend neither on the other rows nor on the thread count. What
// is beyond the rank of G is 0; a layer with a NaN or an infinity in it has NaN factors.
#pragma once
#include "common/factored.h"

namespace lgk::factor_rows {

// rows [n, layers.columns]; out [n, layers.factors] contiguous. T is float, or double when the rows are fp64.
template <typename T>
void factor_rows(const Rows& rows, int64_t n, const Factored& layers, T* out, int n_threads);

}  // namespace lgk::factor_rows
