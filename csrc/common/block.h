// A block of the right operand, packed, and the product of tiles of rows with it.
#pragma once
#include <algorithm>

#include "common/buffer.h"
#include "common/cache.h"
#include "common/kernels.h"

namespace lgk {

constexpr int64_t kMostTileRows = 180;

// Rows of a tile, a multiple of `step`, so that each thread gets as many tiles as the next.
inline int64_t tile_rows(int64_t rows, int64_t step, int n_threads) {
  const int64_t tiles = std::max<int64_t>(1, ceil_div(rows, kMostTileRows * n_threads)) * n_threads;
  return std::max(step, round_up(ceil_div(rows, tiles), step));
}

// Rows column .. column + columns - 1 of b, and depth columns of them from depth_start on.
template <typename T>
struct Block {
  const Products<T>& products;
  Rows b;
  int64_t column, columns;
  int64_t depth_start, depth;
  T* packed;

  int64_t panel() const { return kPanel * products.terms; }
  int64_t strip() const { return kPanelsPerStrip * panel(); }
  int64_t padded() const { return round_up(columns, products.lanes); }
  int64_t packed_size() const { return padded() * ceil_div(depth, products.terms); }
  // Numbers that a thread needs for packing and for a tile of so many rows.
  int64_t scratch_size(int64_t rows) const {
    const int64_t panels = std::min(ceil_div(depth, panel()), kPanelsPerStrip);
    return std::max(panels * strip_panel(rows), products.lanes * kTileLd);
  }

  // Packing b takes so many tasks.
  int64_t pack_tasks() const { return column_groups() * ceil_div(depth, panel()); }
  void pack(int64_t task, T* scratch) const {
    const int64_t k = task / column_groups() * panel(), j = task % column_groups() * 2 * products.lanes;
    const int64_t here = std::min(panel(), depth - k);
    products.pack_columns(b, column + j, std::min(2 * products.lanes, columns - j), depth_start + k, here,
                          packed_panel(k) + j * ceil_div(here, products.terms), scratch);
  }

  // Whether so many rows are multiplied without padding.
  bool fills(int64_t rows) const { return rows % products.row_tile == 0 && columns % products.lanes == 0; }

  // to[i][j] = sum_k a[row + i][depth_start + k] b[column + j][depth_start + k].
  void multiply(const Rows& a, int64_t row, int64_t rows, T* scratch, T* to, int64_t ld) const {
    if (products.multiply_strip != nullptr) return multiply_strips(a, row, rows, scratch, to, ld);
    const int64_t step = strip(), bytes = dtype_bytes(a.dtype);
    const int64_t fetch_step = kCacheLine * products.terms * bytes / int64_t{sizeof(T)};
    for (int64_t start = 0; start < depth; start += step) {
      const int64_t end = std::min(depth, start + step);
      const bool in_place = lies_packed(a, row, rows, end - start);
      const int64_t row_block = rows_at_once(in_place ? a.row_stride * bytes : kTileLd * int64_t{sizeof(T)});
      // All rows at once where a cache line holds numbers of several.
      const int64_t chunk = in_place || a.column_stride > a.row_stride ? rows : row_block;
      for (int64_t first = 0; first < rows; first += chunk) {
        const int64_t count = std::min(chunk, rows - first);
        if (!in_place) pack_strip(a, row + first, count, depth_start + start, end - start, scratch);
        const int64_t stride = in_place ? a.row_stride * bytes : kTileLd * sizeof(T);
        const int64_t panel_bytes = in_place ? kPanel * sizeof(T) : strip_panel(count) * sizeof(T);
        const char* from = in_place ? address(a, row + first, start) : reinterpret_cast<const char*>(scratch);
        for (int64_t i = 0; i < count; i += row_block, from += row_block * stride) {
          const char* next = next_rows(a, row, rows, first + i, row_block, start);
          const char* here = from;
          for (int64_t k = start; k < end; k += panel(), here += panel_bytes) {
            const char* fetched = !in_place           ? next + (k - start) * bytes
                                  : k + panel() < end ? here + panel_bytes
                                                      : next;
            products.multiply(here, stride, std::min(row_block, count - i), packed_panel(k), columns,
                              packed_terms(std::min(panel(), end - k)), to + (first + i) * ld, ld, k > 0,
                              {a.column_stride == 1 ? fetched : nullptr, a.row_stride * bytes, fetch_step});
          }
        }
      }
    }
  }

 private:
  void multiply_strips(const Rows& a, int64_t row, int64_t rows, T* scratch, T* to, int64_t ld) const {
    const int64_t packed_ld = std::min(ceil_div(depth, panel()), kPanelsPerStrip) * kTileLd;
    const Rows packed_rows = matrix(scratch, products.dtype, packed_ld * products.terms, 1);
    const bool packs = a.column_stride != 1;
    for (int64_t start = 0; start < depth; start += strip()) {
      const int64_t width = std::min(strip(), depth - start);
      for (int64_t k = 0; packs && k < width; k += panel()) {
        products.pack_rows(a, row, rows, depth_start + start + k, std::min(panel(), width - k),
                           scratch + k / products.terms, packed_ld);
      }
      const char* next = start + strip() < depth ? address(a, row, start + strip()) : address(a, row + rows, 0);
      products.multiply_strip(packs ? packed_rows : a, packs ? 0 : row, rows, packs ? 0 : depth_start + start, width,
                              packed_panel(start), columns, to, ld, start > 0, packs ? nullptr : next);
    }
  }

  const char* address(const Rows& a, int64_t row, int64_t column) const {
    return static_cast<const char*>(a.data) +
           (a.offset(row) + (depth_start + column) * a.column_stride) * dtype_bytes(a.dtype);
  }

  // What is read after `count` rows at .. of a tile and this strip of theirs: the tile's next rows, its next strip, the
  // next tile.
  const char* next_rows(const Rows& a, int64_t row, int64_t rows, int64_t at, int64_t count, int64_t start) const {
    if (at + count < rows) return address(a, row + at + count, start);
    return start + strip() < depth ? address(a, row, start + strip()) : address(a, row + rows, 0);
  }

  // Half as many as could be where they would push each other out of the cache. More columns have smaller tiles anyway.
  int64_t rows_at_once(int64_t stride) const {
    const int64_t most = products.row_block;
    return columns <= 2 * products.lanes && crowd_a_set(most, stride) ? round_up(most / 2, products.row_tile) : most;
  }

  int64_t packed_terms(int64_t terms) const { return products.terms == 1 ? terms : (terms + 1) / 2; }
  int64_t column_groups() const { return ceil_div(columns, 2 * products.lanes); }
  T* packed_panel(int64_t k) const { return packed + padded() * packed_terms(k); }
  int64_t strip_panel(int64_t rows) const { return round_up(rows, products.row_tile) * kTileLd; }

  bool lies_packed(const Rows& a, int64_t row, int64_t rows, int64_t width) const {
    return a.dtype == products.dtype && !a.rounded && a.column_stride == 1 && rows % products.row_tile == 0 &&
           width % products.terms == 0 && a.even(row, rows);
  }

  // At most strip() columns as panels for multiply one after the other.
  void pack_strip(const Rows& a, int64_t row, int64_t rows, int64_t start, int64_t width, T* dst) const {
    const int64_t step = a.column_stride > a.row_stride || products.terms > 1 ? rows : products.row_tile;
    for (int64_t r = 0; r < rows; r += step) {
      for (int64_t k = 0; k < width; k += panel()) {
        products.pack_rows(a, row + r, std::min(step, rows - r), start + k, std::min(panel(), width - k),
                           dst + k / panel() * strip_panel(rows) + r * kTileLd, kTileLd);
      }
    }
  }
};

}  // namespace lgk
