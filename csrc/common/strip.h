// Packing rows a strip of panels at a time.
#pragma once
#include <algorithm>

#include "common/buffer.h"
#include "common/kernels.h"

namespace lgk {

// Long rows whose distance is a multiple of a large power of 2 fall into the same cache sets, so that what was fetched
// ahead for one row is evicted by the next: each row is read in pieces of at least a quarter of a page.
constexpr int64_t kPanelsPerStrip = 4;

// Columns of the source in a strip.
template <typename T>
int64_t strip_columns(const Products<T>& products) {
  return kPanelsPerStrip * kPanel * products.terms;
}

// Numbers of a packed panel of so many rows.
template <typename T>
int64_t panel_size(const Products<T>& products, int64_t rows) {
  return round_up(rows, products.row_tile) * kTileLd;
}

// Rows row.. of src, at most strip_columns of them from `column`, as panels for multiply one after the other.
template <typename T>
void pack_strip(const Products<T>& products, const Rows& src, int64_t row, int64_t rows, int64_t column,
                int64_t columns, T* dst) {
  const int64_t panel = kPanel * products.terms;
  const int64_t step = src.column_stride > src.row_stride ? rows : products.row_tile;
  for (int64_t r = 0; r < rows; r += step) {
    for (int64_t k = 0; k < columns; k += panel) {
      products.pack_rows(src, row + r, std::min(step, rows - r), column + k, std::min(panel, columns - k),
                         dst + k / panel * panel_size(products, rows) + r * kTileLd, kTileLd);
    }
  }
}

}  // namespace lgk
