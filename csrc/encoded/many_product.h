// The product of encoded rows with many queries: rows are expanded a run of units at a time, which every group of
// queries meets while it is in the L1 cache.
#pragma once
#include <algorithm>
#include <cstring>

#include "encoded/integer_product.h"

namespace lgk {

constexpr int64_t kMostRows = 288;  // rows whose sums a thread holds in the L2 cache

// Queries: packed in groups() of columns() each for rows of kUnitBytes a unit, which
//   expand(codes, units, to)                                             makes of whole units of codes, and
//   tile(group, s, unit, units, rows, ld_rows, row_scales, sums, ld)     multiplies: units of span s, kRows rows.
template <class Queries>
struct ManyProduct : Codes {
  static constexpr int64_t kRows = Queries::kRows, kRunUnits = Queries::kRunUnits, kUnitBytes = Queries::kUnitBytes;
  static constexpr int64_t kLd = kRunUnits * kUnitBytes + 64;  // rows a power of 2 apart would share cache sets
  const Queries& b;
  Output<float> c;

  int64_t ld() const { return b.groups() * b.columns() + 16; }
  int64_t scratch_size(int64_t rows) const {
    return rows * ld() + kRows * (kRunUnits + kLd / 4) + round_up(kRunUnits, kFewLanes);
  }

  void expand(int64_t row, int64_t unit, int64_t units, uint8_t* to) const {
    if (row >= m) {
      std::memset(to, 0, units * kUnitBytes);
      return;
    }
    const bool ragged = unit + units == plan.units() && plan.depth % kUnit != 0;
    b.expand(at(row, unit), units - ragged, to);
    if (!ragged) return;
    uint8_t last[kUnit];
    copy_last(row, plan.units() - 1, last);
    b.expand(last, 1, to + (units - 1) * kUnitBytes);
  }

  void multiply(int64_t row, int64_t rows, float* scratch) const {
    const int64_t end = row + round_up(rows, kRows);
    float *sums = scratch, *scales = sums + (end - row) * ld(), *row_scales = scales + kRows * kRunUnits;
    uint8_t* expanded = reinterpret_cast<uint8_t*>(row_scales + round_up(kRunUnits, kFewLanes));
    std::fill(sums, scales, 0.0f);
    for (int64_t unit = 0; unit < plan.units(); unit += kRunUnits) {
      const int64_t units = std::min(kRunUnits, plan.units() - unit), first = unit / plan.span_units();
      const int64_t spans = ceil_div(units, plan.span_units());
      for (int64_t i = row; i < end; i += kRows) {
        for (int64_t r = 0; r < kRows; ++r) {
          expand(i + r, unit, units, expanded + r * kLd);
          copy_scales(i + r, plan.span, first, spans, row_scales);
          for (int64_t s = 0; s < spans; ++s) scales[s * kRows + r] = row_scales[s];
        }
        CodesAhead next = ahead(i, row, end, kRows, unit, kRunUnits, spans * b.groups());
        for (int64_t g = 0; g < b.groups(); ++g) {
          for (int64_t s = 0; s < spans; ++s) {
            next.fetch();
            const int64_t u = s * plan.span_units();
            b.tile(g, first + s, unit + u, std::min(plan.span_units(), units - u), expanded + u * kUnitBytes, kLd,
                   scales + s * kRows, sums + (i - row) * ld() + g * b.columns(), ld());
          }
        }
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
  constexpr int64_t kRows = Queries::kRows;
  const ManyProduct<Queries> product = {{b.plan, a, m}, b, c};
  const int64_t tasks = std::max<int64_t>(1, ceil_div(m, kMostRows * n_threads)) * n_threads;
  const int64_t task = std::max(kRows, round_up(ceil_div(m, tasks), kRows));
  multiply_tasks(product, task, kRows, product.scratch_size(task), n_threads);
}

}  // namespace lgk
