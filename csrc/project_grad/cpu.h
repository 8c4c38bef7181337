// G[n] = sum_{t of n} w[t] (P_out dy[t]) (P_in x[t])^T, one pass over the positions.
//
// A block of positions is projected into a tile each thread can keep in cache, and each sample's part of the block is
// then added to its G. Order of summation: over d, panels of kPanel terms added in order; over t, counted from the
// sample's start, panels of kPanel positions added in order, four of them before they are added to G. Neither the batch
// nor the thread count changes the bits of a G. Memory: the packed projections, and two tiles a thread.
//
// Where the machine multiplies bf16 itself, terms come in pairs, and projected positions of two bf16 sides are rounded
// to bf16 to be multiplied with each other, as products that return bf16 do; sums are fp32.
#pragma once
#include "common/rows.h"

namespace lgk::project_grad {

// offsets [samples + 1] cut the positions into samples; null: sample n is positions n * length .. (n + 1) * length - 1.
struct Shape {
  int64_t samples, length;
  const int64_t* offsets;
  int64_t d_in, d_out, k_in, k_out;
  bool add;  // to what `out` holds

  int64_t start(int64_t n) const { return offsets != nullptr ? offsets[n] : n * length; }
};

// A side: positions [R, d] and its projection [k, d], beside which fp32 positions may be `rounded`; without one, d is k
// and the positions are taken as they are.
struct Side {
  Rows positions;
  Rows projection;
  bool has_projection;
};

// weights [R] of T or with a null pointer; out [samples, k_out, k_in] contiguous. T is float, or double when all are
// fp64.
template <typename T>
void project_grad(const Side& x, const Side& dy, const Rows& weights, T* out, Shape shape, int n_threads);

}  // namespace lgk::project_grad
