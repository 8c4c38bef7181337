// A matrix of rows as it lies in memory: any dtype, any strides. Nothing here owns memory.
#pragma once
#include <cstdint>

namespace lgk {

enum class Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3 };

inline int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : 2; }

// Row r of an [outer, inner, columns] array is (r / inner, r % inner). Strides are in elements and may be 0.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t inner;
  int64_t outer_stride, row_stride, column_stride;
  bool rounded = false;  // fp32 that counts as bf16: every number is rounded to nearest even as it is read

  Dtype number() const { return rounded ? Dtype::kBF16 : dtype; }
  int64_t offset(int64_t r) const {
    if (inner == INT64_MAX) return r * row_stride;
    return inner > 0 ? r / inner * outer_stride + r % inner * row_stride : 0;
  }

  // Whether rows row .. row + rows - 1 all lie row_stride apart.
  bool even(int64_t row, int64_t rows) const {
    return inner == INT64_MAX || outer_stride == inner * row_stride || row / inner == (row + rows - 1) / inner;
  }

  // The same matrix without its first `rows` rows; only for one without an outer dimension.
  Rows from(int64_t rows) const {
    Rows rest = *this;
    rest.data = static_cast<const char*>(data) + rows * row_stride * dtype_bytes(dtype);
    return rest;
  }
};

inline Rows matrix(const void* data, Dtype dtype, int64_t row_stride, int64_t column_stride) {
  return {data, dtype, INT64_MAX, 0, row_stride, column_stride};
}

// `a` as the left operand of p: numbers wider than p's are rounded to them.
inline Rows beside(Rows a, const Rows& p) {
  a.rounded = a.dtype == Dtype::kF32 && p.dtype == Dtype::kBF16;
  return a;
}

}  // namespace lgk
