// Few queries meet rows of integer codes at the speed of memory: a few streams, each through rows that are neighbours
// in memory, so that the processor's own fetching ahead runs on from row to row.
#include <algorithm>
#include <cstring>

#include "encoded/integer_product.h"

namespace lgk {
namespace {

constexpr int64_t kTaskBytes = 1 << 20;     // of codes
constexpr int64_t kTaskSums = 1024;         // rows times queries at most
constexpr int64_t kDigitBytes = 256 << 10;  // of the queries that meet rows before the next units do: half an L2 cache
constexpr int64_t kMostTaskRows = 256;
constexpr int64_t kVector = 64;  // bytes

// A few queries in groups, each with its units, and every unit with its scale and what the codes' offset adds to it.
struct Columns {
  Plan plan;
  int64_t width, ld;  // queries of a group; units, padded
  Buffer<int8_t> digits;
  Buffer<float> scales, sums;

  explicit Columns(const Plan& plan)
      : plan(plan),
        width(ceil_div(plan.queries, ceil_div(plan.queries, kFewQueries))),
        ld(round_up(plan.units(), kFewLanes)),
        digits(groups() * width * plan.digits * padded_units() * kUnit),
        scales(groups() * width * ld),
        sums(groups() * width * ld) {
    std::fill_n(scales.data(), groups() * width * ld, 0.0f);
    std::fill_n(sums.data(), groups() * width * ld, 0.0f);
    if (plan.queries % width == 0 && padded_units() == plan.units()) return;
    std::memset(digits.data(), 0, groups() * width * plan.digits * padded_units() * kUnit);
  }

  int64_t groups() const { return ceil_div(plan.queries, width); }
  int64_t padded_units() const { return round_up(plan.units(), chunk_units(plan.code)); }
  int8_t* digits_of(int64_t group, int64_t unit) const {
    return digits.data() + (group * padded_units() + unit) * width * plan.digits * kUnit;
  }

  void place(int64_t query, int64_t s, const Span& from) const {
    const bool shared = plan.code == Code::kI2 || plan.code == Code::kSign;
    for (int64_t u = 0; u < from.units; ++u) {
      const int64_t unit = s * plan.span_units() + u;
      place_digits(query, unit, from.digits[u]);
      int64_t sum = from.sums[u][0];
      for (int d = 1; d < plan.digits; ++d) sum += int64_t{256} * from.sums[u][d];
      scales.data()[query * ld + unit] = shared ? kFewShare * from.unit : from.unit;
      sums.data()[query * ld + unit] = from.unit * static_cast<float>(offset_of(plan.code) * sum);
    }
  }

 private:
  template <int64_t kUnits>
  void place_unit(int64_t query, int64_t unit, const int8_t* from) const {
    constexpr int64_t kVectors = kUnits * kUnit / kVector, kSize = kVector / kUnits;
    int8_t* chunk = digits_of(query / width, unit / kUnits * kUnits);
    for (int64_t d = 0; d < plan.digits; ++d) {
      int8_t* to = chunk + (query % width * plan.digits + d) * kUnits * kUnit + unit % kUnits * kSize;
      for (int64_t v = 0; v < kVectors; ++v) {
        std::memcpy(to + v * kVector, from + d * kUnit + field_of(plan.code, v) * kSize, kSize);
      }
    }
  }

  void place_digits(int64_t query, int64_t unit, const int8_t* from) const {
    const int64_t units = chunk_units(plan.code);
    if (units == 1) return place_unit<1>(query, unit, from);
    if (units == 2) return place_unit<2>(query, unit, from);
    place_unit<4>(query, unit, from);
  }
};

struct FewProduct : Codes {
  const Columns& b;
  int64_t task;  // rows
  Output<float> c;

  int64_t units_at_once() const {
    const int64_t units = kDigitBytes / (b.groups() * b.width * plan.digits * kUnit);
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
      const int64_t at = g * b.width * b.ld + unit;
      kernels.few(plan.code, from, ragged ? ends : nullptr, units, scales, b.digits_of(g, unit), plan.digits,
                  b.scales.data() + at, b.sums.data() + at, b.ld, b.width,
                  sums + g * steps * kFewRows * b.width * kFewLanes, unit > 0);
    }
  }
};

int64_t rows_of_task(const Codes& codes, int n_threads) {
  const int64_t large = kTaskBytes / codes.a.encoding.bytes(codes.plan.depth);
  const int64_t most = std::min(kMostTaskRows, kTaskSums / codes.plan.queries);
  const int64_t rows = std::min(std::clamp<int64_t>(large, 16, most), ceil_div(codes.m, 4 * n_threads));
  return round_up(rows, kFewRows);
}

struct FewQueries : IntegerQueries {
  Columns columns;

  explicit FewQueries(const Plan& plan) : columns(plan) {}
  void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const override {
    const Codes codes = {columns.plan, a, m};
    const FewProduct product = {codes, columns, rows_of_task(codes, n_threads), c};
    multiply_tasks(product, product.task, kFewRows, product.scratch_size(), n_threads);
  }
};

}  // namespace

std::unique_ptr<IntegerQueries> pack_few_integers(const Plan& plan, const Rows& b, int n_threads) {
  auto queries = std::make_unique<FewQueries>(plan);
  if (!place_spans(queries->columns, b, n_threads)) return nullptr;
  return queries;
}

}  // namespace lgk
