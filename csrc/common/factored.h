// Rows kept as factors: of each layer's G [k_out, k_in] ~ sum_c u_c v_c^T the vectors u_1 .. u_rank, then v_1 ..
// v_rank.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "common/rows.h"

namespace lgk {

constexpr int64_t kMostRank = 8;

// One layer's part of a dense row, from number `column` on, and of a factored row, from number `factor` on.
struct FactoredLayer {
  int64_t k_out, k_in;
  int64_t column, factor;

  int64_t size() const { return k_out * k_in; }
};

struct Factored {
  std::vector<FactoredLayer> layers;
  int64_t rank;
  int64_t columns, factors;  // numbers of a dense and of a factored row

  // Each layer's factors begin at a multiple of `align`.
  Factored(const std::vector<std::pair<int64_t, int64_t>>& sizes, int64_t rank, int64_t align)
      : rank(rank), columns(0), factors(0) {
    for (const auto& [k_out, k_in] : sizes) {
      factors = (factors + align - 1) / align * align;
      layers.push_back({k_out, k_in, columns, factors});
      columns += k_out * k_in;
      factors += rank * (k_out + k_in);
    }
  }
};

// The columns of a matrix from `column` on.
inline Rows columns_from(const Rows& rows, int64_t column) {
  Rows rest = rows;
  rest.data = static_cast<const char*>(rows.data) + column * rows.column_stride * dtype_bytes(rows.dtype);
  return rest;
}

// `count` vectors of `size` numbers that lie one after the other in each row, as rows of a matrix.
inline Rows vectors_in(const Rows& rows, int64_t column, int64_t count, int64_t size) {
  const Rows from = columns_from(rows, column);
  return {from.data, from.dtype, count, from.row_stride, size * from.column_stride, from.column_stride};
}

}  // namespace lgk
