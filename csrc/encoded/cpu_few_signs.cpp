// Few queries meet rows of signs at the speed of memory: no product is made, tables of a query's sums are looked up.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/cache.h"
#include "encoded/integer_product.h"
#include "encoded/signs.h"

namespace lgk {
namespace {

constexpr int64_t kTaskBytes = 8 << 20;     // of codes
constexpr int64_t kTaskSums = 2048;         // rows times queries at most
constexpr int64_t kTableBytes = 256 << 10;  // of the queries that rows meet at a time: part of an L2 cache

// A few queries in groups, each with its units' tables and their scales.
struct SignTables {
  const SignKernels& kernels = *sign_kernels();
  Plan plan;
  int64_t width, ld;  // queries of a group; units, padded
  Buffer<uint8_t> tables;
  Buffer<float> scales;

  explicit SignTables(const Plan& plan)
      : plan(plan),
        width(ceil_div(plan.queries, ceil_div(plan.queries, kFewQueries))),
        ld(round_up(plan.units(), kScaleUnits)),
        tables(groups() * width * ld * kSignTable),
        scales(groups() * width * ld) {
    std::fill_n(scales.data(), groups() * width * ld, 0.0f);
    if (plan.queries % width == 0 && ld == plan.units()) return;
    std::memset(tables.data(), 0, groups() * width * ld * kSignTable);
  }

  int64_t groups() const { return ceil_div(plan.queries, width); }
  int64_t run_units() const {
    const int64_t units = kTableBytes / (groups() * width * kSignTable);
    return std::min(units / kScaleUnits * kScaleUnits, ld);
  }
  // Of a query and the units beside this one.
  uint8_t* tables_of(int64_t query, int64_t unit) const {
    const int64_t beside = kernels.units_beside, first = (query / width * ld + unit / beside * beside) * width;
    return tables.data() + (first + query % width * beside) * kSignTable;
  }

  // False if the span holds NaN or Inf.
  bool pack(const Rows& b, int64_t query, int64_t s, float* x) const {
    const float* from = span_numbers(plan, b, query, s, x);
    const int64_t first = s * plan.span_units(), units = plan.units_of(s);
    bool finite = true;
    for (int64_t u = 0; u < units; ++u) {
      const float most = kernels.largest_sum(from + u * kUnit), unit = most / kLargestSum;
      finite = finite && std::isfinite(most);
      const bool some = unit >= std::numeric_limits<float>::min() && std::isfinite(most);
      scales.data()[query * ld + first + u] = some ? unit : 0.0f;
      kernels.make_tables(from + u * kUnit, some ? 1.0f / unit : 0.0f, first + u, tables_of(query, first + u));
    }
    return finite;
  }
};

struct SignProduct : Codes {
  const SignTables& b;
  int64_t task;  // rows
  Output<float> c;

  int64_t group_sums() const { return b.width * kSignRows; }
  int64_t sums_size() const { return task * b.groups() * b.width; }
  int64_t scratch_size() const { return sums_size() + kSignRows * b.run_units(); }

  void multiply(int64_t row, int64_t rows, float* scratch) const {
    const int64_t steps = ceil_div(rows, kSignRows), step_sums = b.groups() * group_sums(), end = row + rows;
    float* copies = scratch + sums_size();
    std::fill(scratch, copies, 0.0f);
    for (int64_t unit = 0; unit < plan.units(); unit += b.run_units()) {
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t first = row + step * kSignRows;
        const bool on = step + 1 < steps;
        Next next = on ? ahead(first + kSignRows, end, unit) : ahead(row, end, unit + b.run_units());
        multiply_units(first, end, unit, copies, scratch + step * step_sums, next);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = scratch + i / kSignRows * step_sums + i % kSignRows;
      for (int64_t q = 0; q < plan.queries; ++q) {
        c.data[(row + i) * c.row_stride + q * c.column_stride] = from[q * kSignRows];
      }
    }
  }

 private:
  int64_t units_from(int64_t unit) const { return std::min(b.run_units(), plan.units() - unit); }
  int64_t bytes_from(int64_t unit) const {
    return a.encoding.bytes(std::min(b.run_units() * kUnit, plan.depth - unit * kUnit));
  }

  Next ahead(int64_t row, int64_t end, int64_t unit) const {
    if (unit >= plan.units()) return {};
    const int64_t units = units_from(unit), rows = std::min(kSignRows, end - row);
    const auto lines = [&](const void* from, int64_t stride, int64_t bytes, int64_t steps) {
      const int64_t left = rows * ceil_div(bytes, kCacheLine);
      return Ahead{static_cast<const uint8_t*>(from), stride, bytes, left, ceil_div(left, steps), fetches_into_l2()};
    };
    Next next = {lines(at(row, unit), a.code_stride, bytes_from(unit), units * b.width * b.kernels.fetches), {}};
    if (scales_lie_whole()) {
      next.scales = lines(whole_scales(row, unit), a.scale_stride * 4, units * 4, ceil_div(units, kScaleUnits));
    }
    return next;
  }

  void multiply_units(int64_t row, int64_t end, int64_t unit, float* copies, float* sums, Next& next) const {
    const uint8_t* codes[kSignRows];
    const float* scales[kSignRows];
    for (int64_t i = 0; i < kSignRows; ++i) {
      const int64_t of = std::min(row + i, end - 1);
      codes[i] = at(of, unit);
      scales[i] = scales_of(of, unit, units_from(unit), copies + i * b.run_units());
    }
    for (int64_t g = 0; g < b.groups(); ++g) {
      b.kernels.multiply[b.width - 1](codes, bytes_from(unit), scales, units_from(unit), b.tables_of(g * b.width, unit),
                                      b.scales.data() + g * b.width * b.ld + unit, b.ld, sums + g * group_sums(), next);
      next = {};
    }
  }
};

int64_t rows_of_task(const Codes& codes, int n_threads) {
  const int64_t large = kTaskBytes / codes.a.encoding.bytes(codes.plan.depth);
  const int64_t most = std::max(kSignRows, kTaskSums / codes.plan.queries);
  const int64_t rows = std::min(std::clamp(large, kSignRows, most), ceil_div(codes.m, 4 * n_threads));
  return round_up(rows, kSignRows);
}

struct SignQueries : IntegerQueries {
  SignTables tables;

  explicit SignQueries(const Plan& plan) : tables(plan) {}
  void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const override {
    const Codes codes = {tables.plan, a, m};
    const SignProduct product = {codes, tables, rows_of_task(codes, n_threads), c};
    multiply_tasks(product, product.task, kSignRows, product.scratch_size(), n_threads);
  }
};

}  // namespace

bool tables_pay(const Plan& plan) {
  if (plan.code != Code::kSign || plan.of_int8() || sign_kernels() == nullptr) return false;
  return plan.queries > 1 || sign_kernels()->pieces_pay || plan.units() * kSignTable <= kTableBytes;
}

std::unique_ptr<IntegerQueries> pack_few_signs(const Plan& plan, const Rows& b, int n_threads) {
  auto queries = std::make_unique<SignQueries>(plan);
  const SignTables& tables = queries->tables;
  const auto pack = [&](int64_t query, int64_t s, float* x) { return tables.pack(b, query, s, x); };
  if (!pack_spans(plan, pack, n_threads)) return nullptr;
  return queries;
}

}  // namespace lgk
