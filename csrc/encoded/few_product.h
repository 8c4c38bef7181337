// The product of encoded rows with few queries, at the speed of memory: a few streams, each through rows that are
// neighbours in memory, so that the processor's own fetching ahead runs on from row to row.
#pragma once
#include <algorithm>
#include <cstring>

#include "encoded/integer_product.h"

namespace lgk {

constexpr int64_t kTaskBytes = 1 << 20;     // of codes
constexpr int64_t kTaskSums = 1024;         // rows times queries at most
constexpr int64_t kQueryBytes = 256 << 10;  // of the queries that meet rows before the next units do: half an L2 cache
constexpr int64_t kMostTaskRows = 256;

// Columns: the plan's queries, laid out unit by unit in groups() of `width` each. Of the rows from a unit on,
//   few(group, unit, rows, last, units, row_scales, sums, add)
// multiplies so many units, unit_bytes() of all the queries each, as IntegerKernels::few does.
template <class Columns>
struct FewProduct : Codes {
  const Columns& b;
  int64_t task;  // rows
  Output<float> c;

  int64_t units_at_once() const {
    const int64_t units = kQueryBytes / b.unit_bytes();
    return std::min(units / kFewLanes * kFewLanes, plan.units());
  }
  // Sums of a task's rows, then scales and last units of kFewRows.
  int64_t sums_size() const { return task * b.groups() * b.width * kFewLanes; }
  int64_t scales_size() const { return round_up(units_at_once(), kFewLanes); }
  int64_t scratch_size() const { return sums_size() + kFewRows * (scales_size() + kUnit / 4); }

  void multiply(int64_t row, int64_t rows, float* scratch) const {
    const int64_t steps = ceil_div(rows, kFewRows);
    for (int64_t unit = 0; unit < plan.units(); unit += units_at_once()) {
      for (int64_t step = 0; step < steps; ++step) {
        int64_t of[kFewRows];
        for (int64_t i = 0; i < kFewRows; ++i) of[i] = row + std::min(row_of(step, i, steps), rows - 1);
        multiply_units(of, unit, scratch, scratch + step * kFewRows * b.width * kFewLanes, steps);
      }
    }
    for (int64_t g = 0; g < b.groups(); ++g) {
      for (int64_t step = 0; step < steps; ++step) write(row, rows, step, steps, g, scratch);
    }
  }

 private:
  // Row i of a step, counted from the task's first one: the next of its stream.
  int64_t row_of(int64_t step, int64_t i, int64_t steps) const {
    const int64_t side = streams(plan.code, plan.units(), b.width, plan.digits), rows = kFewRows / side;
    return (i % side * steps + step) * rows + i / side;
  }

  void write(int64_t row, int64_t rows, int64_t step, int64_t steps, int64_t group, const float* scratch) const {
    float found[kFewRows * kFewQueries];
    const int64_t width = b.width, vectors = kFewRows * width;
    kernels.sum_lanes(scratch + (group * steps + step) * vectors * kFewLanes, vectors, found);
    for (int64_t i = 0; i < kFewRows; ++i) {
      if (row_of(step, i, steps) >= rows) continue;  // the next one may be of a stream that is not at its end
      float* to = c.data + (row + row_of(step, i, steps)) * c.row_stride + group * width * c.column_stride;
      const int64_t count = std::min(width, plan.queries - group * width);
      for (int64_t q = 0; q < count; ++q) to[q * c.column_stride] = found[i * width + q];
    }
  }

  void multiply_units(const int64_t (&of)[kFewRows], int64_t unit, float* scratch, float* sums, int64_t steps) const {
    const int64_t units = std::min(units_at_once(), plan.units() - unit);
    const int64_t chunk = chunk_units(plan.code);
    const bool ragged = unit + units == plan.units() && plan.depth % (chunk * kUnit) != 0;
    float* copies = scratch + sums_size();
    uint8_t* last = reinterpret_cast<uint8_t*>(copies + kFewRows * scales_size());
    const uint8_t *from[kFewRows], *ends[kFewRows];
    const float* scales[kFewRows];
    for (int64_t i = 0; i < kFewRows; ++i) {
      from[i] = at(of[i], unit);
      ends[i] = last + i * kUnit;
      if (ragged) copy_last(of[i], (plan.units() - 1) / chunk * chunk, last + i * kUnit);
      scales[i] = scales_of(of[i], unit, units, copies + i * scales_size());
    }
    for (int64_t g = 0; g < b.groups(); ++g) {
      b.few(g, unit, from, ragged ? ends : nullptr, units, scales, sums + g * steps * kFewRows * b.width * kFewLanes,
            unit > 0);
    }
  }
};

inline int64_t rows_of_task(const Codes& codes, int n_threads) {
  const int64_t large = kTaskBytes / codes.a.encoding.bytes(codes.plan.depth);
  const int64_t most = std::min(kMostTaskRows, kTaskSums / codes.plan.queries);
  const int64_t rows = std::min(std::clamp<int64_t>(large, 16, most), ceil_div(codes.m, 4 * n_threads));
  return round_up(rows, kFewRows);
}

template <class Columns>
void multiply_few_queries(const Columns& columns, const EncodedRows& a, int64_t m, Output<float> c, int n_threads) {
  const Codes codes = {columns.plan, a, m};
  const FewProduct<Columns> product = {codes, columns, rows_of_task(codes, n_threads), c};
  multiply_tasks(product, product.task, kFewRows, product.scratch_size(), n_threads);
}

}  // namespace lgk
