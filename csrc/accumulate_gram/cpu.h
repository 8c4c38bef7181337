// out += sum_n g[n] g[n]^T. Order of summation: panels of kPanel rows (of pairs of rows where the machine multiplies
// bf16 itself), each a chain; the sums of a run of panels are added in order and then added to out, run by run.
// out[i][j] and out[j][i] receive the same number.
#pragma once
#include "common/rows.h"

namespace lgk::accumulate_gram {

struct Shape {
  int64_t rows, d;
};

// g [rows, d]; out [d, d] contiguous. T is float, or double when g is fp64.
template <typename T>
void accumulate_gram(const Rows& g, T* out, Shape shape, int n_threads);

}  // namespace lgk::accumulate_gram
