// The product of encoded rows with many queries: rows are expanded a run of units at a time, which every group of
// queries meets while it is in the L1 cache.
#pragma once
#include <algorithm>
#include <cstring>

#include "encoded/integer_product.h"

namespace lgk {

constexpr int64_t kMostRows = 288;  // rows whose sums a thread holds in the L2 cache

// Queries: packed in groups() of columns() each for rows which
//   expand(codes, units, to)               makes of whole units of codes,
//   tile(group, s, unit, units, rows, ld_rows, row_scales, sums, ld, pending)
//                                          multiplies, units of span s and kernels.shape.rows rows, and
//   finish(ld, pending)                    adds to the sums, where tile has left something.
template <class Queries>
struct ManyProduct : Codes {
  const Queries& b;
  Output<float> c;
  const TileShape shape = b.kernels.shape;

  // Rows a power of 2 apart would share cache sets.
  int64_t ld_rows() const { return shape.run_units * shape.unit_bytes + 64; }
  int64_t ld() const { return b.groups() * b.columns() + 16; }
  int64_t scratch_size(int64_t rows) const {
    return rows * ld() + shape.rows * (shape.run_units + ld_rows() / 4) + round_up(shape.run_units, kFewLanes);
  }

  void expand(int64_t row, int64_t unit, int64_t units, uint8_t* to) const {
    if (row >= m) {
      std::memset(to, 0, units * shape.unit_bytes);
      return;
    }
    const bool ragged = unit + units == plan.units() && plan.depth % kUnit != 0;
    b.expand(at(row, unit), units - ragged, to);
    if (!ragged) return;
    uint8_t last[kUnit];
    copy_last(row, plan.units() - 1, last);
    b.expand(last, 1, to + (units - 1) * shape.unit_bytes);
  }

  void multiply(int64_t row, int64_t rows, float* scratch) const {
    const int64_t step = shape.rows, run = shape.run_units, end = row + round_up(rows, step);
    float *sums = scratch, *scales = sums + (end - row) * ld(), *row_scales = scales + step * run;
    uint8_t* expanded = reinterpret_cast<uint8_t*>(row_scales + round_up(run, kFewLanes));
    Pending pending;
    std::fill(sums, scales, 0.0f);
    for (int64_t unit = 0; unit < plan.units(); unit += run) {
      const int64_t units = std::min(run, plan.units() - unit), first = unit / plan.span_units();
      const int64_t spans = ceil_div(units, plan.span_units());
      for (int64_t i = row; i < end; i += step) {
        for (int64_t r = 0; r < step; ++r) {
          expand(i + r, unit, units, expanded + r * ld_rows());
          copy_scales(i + r, plan.span, first, spans, row_scales);
          for (int64_t s = 0; s < spans; ++s) scales[s * step + r] = row_scales[s];
        }
        CodesAhead next = ahead(i, row, end, step, unit, run, spans * b.groups());
        for (int64_t g = 0; g < b.groups(); ++g) {
          for (int64_t s = 0; s < spans; ++s) {
            next.fetch();
            const int64_t u = s * plan.span_units();
            b.tile(g, first + s, unit + u, std::min(plan.span_units(), units - u), expanded + u * shape.unit_bytes,
                   ld_rows(), scales + s * step, sums + (i - row) * ld() + g * b.columns(), ld(), pending);
          }
        }
        b.finish(ld(), pending);
      }
    }
    for (int64_t q = 0; q < plan.queries; ++q) {
      for (int64_t r = 0; r < std::min(rows, m - row); ++r) {
        c.data[(row + r) * c.row_stride + q * c.column_stride] = sums[r * ld() + q];
      }
    }
  }
};

// Every thread gets as many tasks as the next, and a task's sums fit the cache.
template <class Queries>
void multiply_many(const Queries& b, const EncodedRows& a, int64_t m, Output<float> c, int n_threads) {
  const ManyProduct<Queries> product = {{b.plan, a, m}, b, c};
  const int64_t tile = product.shape.rows;
  const int64_t tasks = std::max<int64_t>(1, ceil_div(m, kMostRows * n_threads)) * n_threads;
  const int64_t task = std::max(tile, round_up(ceil_div(m, tasks), tile));
  multiply_tasks(product, task, tile, product.scratch_size(task), n_threads);
}

}  // namespace lgk
