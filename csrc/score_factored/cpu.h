// S[q,n] = sum_l sum_c u_{n,l,c}^T Q_{q,l} v_{n,l,c}: dense queries against rows kept as factors.
//
// Two ways, by cost: the queries' layers times every v and the result contracted with u, for one factor or one query;
// or a tile of rows is rebuilt in cache and multiplied. Either way a thread holds a tile of rows, and memory carries
// the factors only. The first multiplies bf16 by bf16 where the machine does; the second in fp32.
//
// Order of summation: within a layer the panels of products.h; layers in order, those of a group and then the groups.
// Neither the number of rows nor the thread count changes the bits of a result, the number of queries only by the
// grouping of layers and by which of the two ways is taken.
#pragma once
#include "common/factored.h"
#include "encoded/rows.h"

namespace lgk::score_factored {

struct Shape {
  int64_t queries, rows;
};

// queries [queries, layers.columns], factors [rows, layers.factors]; out [queries, rows] contiguous. T is float, or
// double when the factors are fp64.
template <typename T>
void score_factored(const Rows& queries, const Rows& factors, const Factored& layers, T* out, Shape shape,
                    int n_threads);

// The same on encoded factors, which are decoded a layer of a tile of rows at a time.
void score_encoded(const Rows& queries, const EncodedRows& factors, const Factored& layers, float* out, Shape shape,
                   int n_threads);

}  // namespace lgk::score_factored
