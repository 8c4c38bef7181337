// What every binding needs: addresses as integers, a dtype code, and ValueError for what does not fit.
#pragma once
#include <pybind11/pybind11.h>

#include "common/check.h"
#include "common/factored.h"
#include "common/rows.h"

namespace lgk {

using Address = std::uintptr_t;

inline Dtype dtype_of(const char* op, int code) {
  LGK_CHECK(code >= 0 && code <= 3, std::string(op) + ": dtype code " + std::to_string(code) + " is unknown");
  return static_cast<Dtype>(code);
}

// A tensor as (address, dtype code, row stride, column stride).
using Matrix = std::tuple<Address, int, int64_t, int64_t>;
// A tensor of positions as (address, dtype code, rows of an outer index, outer stride, row stride, column stride).
using Positions = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;

inline Rows rows_of(const char* op, const Matrix& m) {
  const auto& [data, dtype, row_stride, column_stride] = m;
  return matrix(reinterpret_cast<const void*>(data), dtype_of(op, dtype), row_stride, column_stride);
}

inline Rows rows_of(const char* op, const Positions& p) {
  const auto& [data, dtype, inner, outer_stride, row_stride, column_stride] = p;
  LGK_CHECK(inner >= 0, std::string(op) + ": size " + std::to_string(inner) + " is negative");
  return {reinterpret_cast<const void*>(data), dtype_of(op, dtype), inner, outer_stride, row_stride, column_stride};
}

// Whether the kernel runs in double; mixed precisions are refused.
inline bool is_double(const char* op, std::initializer_list<Dtype> dtypes) {
  bool any = false, all = true;
  for (Dtype dtype : dtypes) {
    any = any || dtype == Dtype::kF64;
    all = all && dtype == Dtype::kF64;
  }
  LGK_CHECK(any == all, std::string(op) + ": fp64 does not mix with other dtypes");
  return all;
}

// The layers of rows kept as factors, as (k_out, k_in) each.
using LayerSizes = std::vector<std::pair<int64_t, int64_t>>;

inline Factored factored_of(const char* op, const LayerSizes& sizes, int64_t rank, int64_t align = 1) {
  LGK_CHECK(rank >= 1 && rank <= kMostRank,
            std::string(op) + ": rank " + std::to_string(rank) + " is not in 1.." + std::to_string(kMostRank));
  for (const auto& [k_out, k_in] : sizes) check_sizes(op, {k_out, k_in, static_cast<int64_t>(sizes.size())});
  LGK_CHECK(align >= 1, std::string(op) + ": align " + std::to_string(align) + " is not positive");
  return {sizes, rank, align};
}

inline void check_threads(const char* op, int n_threads) {
  LGK_CHECK(n_threads >= 1, std::string(op) + ": " + std::to_string(n_threads) + " threads; at least 1 is needed");
}

}  // namespace lgk
