// Products of encoded rows with queries; the numbers are decoded on their way into the registers.
#pragma once
#include "common/product.h"
#include "encoded/rows.h"

namespace lgk {

// The most columns for which the rows are read but once, at the speed of memory.
constexpr int64_t kFewColumns = 8;

// c[i][j] = sum_k a[i][k] b[j][k] for i < m, j < n, k < depth; sizes 0 are allowed and a sum of nothing is 0.
//
// digits 0: fp32 products of the decoded numbers with b. Otherwise, where the machine multiplies bytes or words, b in
// fixed point of so many bytes (1 or 2) a number and span of at most kMostSpan numbers (encoded/integers.h): exact sums
// of a span, added in order. Integer codes in blocks of kUnit numbers and more have this, unless b's rows that are laid
// out together, 64 or 256 neighbours, hold NaN or Inf; all else goes the first way, with 1 digit by b's numbers rounded
// to int8. Columns meet fp8 codes in such blocks, where it multiplies bf16 too, as bf16 numbers and bytes of what those
// leave, or numbers of bf16 where there are few, off by as little; with 1 digit as whole numbers of bf16
// (encoded/f8.h). Few columns meet sign codes by sums of four of b's numbers in 2 bytes instead (encoded/signs.h), as
// exactly. Neither m nor the thread count changes the bits of a result.
void multiply_encoded(const EncodedRows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<float> c,
                      int digits, int n_threads);

// The fp32 way; m, n, depth > 0.
void multiply_decoded(const EncodedRows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<float> c,
                      int n_threads);

}  // namespace lgk
