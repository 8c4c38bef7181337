#include <omp.h>

#include <algorithm>

#include "common/buffer.h"
#include "common/few.h"
#include "common/kernels.h"
#include "common/product.h"
#include "common/strip.h"
#include "common/threads.h"

namespace lgk {
namespace {

constexpr int64_t kRun = kPanelsPerRun * kPanel;
// Columns of b that are packed at a time, which bounds the packed copy to kColumns * kRun numbers.
constexpr int64_t kColumns = 256;
constexpr int64_t kMostTileRows = 120;

template <typename T>
void add_tile(const T* tile, int64_t ld, int64_t rows, int64_t columns, Output<T> c, bool add) {
  if (c.column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      T* out = c.data + i * c.row_stride;
      for (int64_t j = 0; j < columns; ++j) out[j] = add ? out[j] + tile[i * ld + j] : tile[i * ld + j];
    }
    return;
  }
  for (int64_t j = 0; j < columns; ++j) {
    T* out = c.data + j * c.column_stride;
    for (int64_t i = 0; i < rows; ++i) {
      T& to = out[i * c.row_stride];
      to = add ? to + tile[i * ld + j] : tile[i * ld + j];
    }
  }
}

// One block of columns of b and one run of the depth, both counted in columns of the source.
template <typename T>
struct Block {
  const Products<T>& products;
  Rows b;
  int64_t column, columns;
  int64_t depth_start, depth;
  T* packed;

  int64_t panel() const { return kPanel * products.terms; }
  int64_t padded() const { return round_up(columns, products.lanes); }
  int64_t column_groups() const { return ceil_div(columns, 2 * products.lanes); }
  int64_t pack_tasks() const { return column_groups() * ceil_div(depth, panel()); }
  T* packed_panel(int64_t k) const { return packed + padded() * (k / products.terms); }

  void pack(int64_t task, T* scratch) const {
    const int64_t k = task / column_groups() * panel(), j = task % column_groups() * 2 * products.lanes;
    const int64_t here = std::min(panel(), depth - k);
    products.pack_columns(b, column + j, std::min(2 * products.lanes, columns - j), depth_start + k, here,
                          packed_panel(k) + j * ceil_div(here, products.terms), scratch);
  }

  void multiply(const Rows& a, int64_t row, int64_t rows, T* strip, T* c_tile, int64_t ld) const {
    for (int64_t start = 0; start < depth; start += strip_columns(products)) {
      const int64_t end = std::min(depth, start + strip_columns(products));
      pack_strip(products, a, row, rows, depth_start + start, end - start, strip);
      for (int64_t k = start; k < end; k += panel()) {
        products.multiply(strip + (k - start) / panel() * panel_size(products, rows), rows, packed_panel(k), columns,
                          ceil_div(std::min(panel(), end - k), products.terms), c_tile, ld, k > 0);
      }
    }
  }
};

template <typename T>
void multiply_tiles(const Rows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<T> c, int n_threads) {
  const Products<T>& products = lgk::products<T>(a.dtype, b.dtype);
  n_threads = threads_for(double(m) * n * depth, n_threads);
  const int64_t tile_rows =
      std::min(kMostTileRows, round_up(ceil_div(m, std::min<int64_t>(n_threads, m)), products.row_tile));
  const int64_t widest = round_up(std::min(n, kColumns), products.lanes), run = kRun * products.terms;
  const int64_t ld = widest + products.lanes;
  const int64_t strip_size =
      std::max(std::min(ceil_div(depth, kPanel * products.terms), kPanelsPerStrip) * panel_size(products, tile_rows),
               products.lanes * kTileLd);
  const int64_t scratch_size = round_up(strip_size + tile_rows * ld, products.lanes);
  const Buffer<T> packed(widest * std::min(ceil_div(depth, products.terms), kRun)), scratch(scratch_size * n_threads);

#pragma omp parallel num_threads(n_threads)
  {
    T* strip = scratch.data() + scratch_size * omp_get_thread_num();
    T* c_tile = strip + strip_size;
    for (int64_t j = 0; j < n; j += kColumns) {
      for (int64_t k = 0; k < depth; k += run) {
        const Block<T> block = {products, b, j, std::min(kColumns, n - j), k, std::min(run, depth - k), packed.data()};
#pragma omp for schedule(static)
        for (int64_t task = 0; task < block.pack_tasks(); ++task) block.pack(task, strip);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < m; i += tile_rows) {
          const int64_t rows = std::min(tile_rows, m - i);
          block.multiply(a, i, rows, strip, c_tile, ld);
          add_tile<T>(c_tile, ld, rows, block.columns,
                      {c.data + i * c.row_stride + j * c.column_stride, c.row_stride, c.column_stride}, k > 0);
        }
      }
    }
  }
}

}  // namespace

template <typename T>
void multiply_rows(const Rows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<T> c, int n_threads) {
  if (m == 0 || n == 0) return;
  if (depth == 0) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) c.data[i * c.row_stride + j * c.column_stride] = 0;
    }
    return;
  }
  if (n <= kFew) return multiply_few(a, m, b, n, depth, c, n_threads);
  if (n <= m) return multiply_tiles(a, m, b, n, depth, c, n_threads);
  multiply_tiles<T>(b, n, a, m, depth, {c.data, c.column_stride, c.row_stride}, n_threads);
}

template void multiply_rows<float>(const Rows&, int64_t, const Rows&, int64_t, int64_t, Output<float>, int);
template void multiply_rows<double>(const Rows&, int64_t, const Rows&, int64_t, int64_t, Output<double>, int);

}  // namespace lgk
