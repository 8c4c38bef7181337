// Many queries meet fp8 rows as numbers of bf16, and what their own rounding to bf16 leaves as bytes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "encoded/f8.h"
#include "encoded/integer_product.h"

namespace lgk {
namespace {

constexpr int64_t kRunUnits = 4;            // of kStepRows rows that are expanded at a time, into the L1 cache
constexpr int64_t kStepRows = 2 * kF8Rows;  // that meet a span of queries while it is in the L1 cache
constexpr int64_t kMostRows = 288;          // rows whose sums a thread holds in the L2 cache
constexpr int64_t kPairs = kUnit / 2, kSteps = kUnit / kF8Step;

// Queries in groups, each with its units, span starts and span scales.
struct F8Tiles {
  Plan plan;
  bool rests;
  Buffer<uint8_t> parts;
  Buffer<int32_t> starts;
  Buffer<float> scales;
  const F8Kernels& kernels = *f8_kernels();

  F8Tiles(const Plan& plan, bool rests)
      : plan(plan),
        rests(rests),
        parts(groups() * group_bytes()),
        starts(groups() * kF8Columns * plan.spans()),
        scales(groups() * kF8Columns * plan.spans()) {
    if (plan.queries % kF8Columns == 0) return;
    std::memset(parts_of(groups() - 1, 0), 0, group_bytes());
    std::memset(starts_of(groups() - 1, 0), 0, kF8Columns * plan.spans() * sizeof(int32_t));
    std::memset(scales_of(groups() - 1, 0), 0, kF8Columns * plan.spans() * sizeof(float));
  }

  int64_t groups() const { return ceil_div(plan.queries, kF8Columns); }
  int64_t unit_bytes() const { return kSteps * f8_step(rests); }
  int64_t group_bytes() const { return plan.units() * unit_bytes(); }
  uint8_t* parts_of(int64_t group, int64_t unit) const {
    return parts.data() + group * group_bytes() + unit * unit_bytes();
  }
  int32_t* starts_of(int64_t group, int64_t s) const { return starts.data() + (group * plan.spans() + s) * kF8Columns; }
  float* scales_of(int64_t group, int64_t s) const { return scales.data() + (group * plan.spans() + s) * kF8Columns; }

  // False if the span holds NaN or Inf.
  bool pack(const Rows& b, int64_t query, int64_t s, float* x) const {
    const float* from = span_numbers(plan, b, query, s, x);
    const int64_t units = plan.units_of(s), group = query / kF8Columns, lane = query % kF8Columns;
    const float most = integer_kernels()->largest(from, units * kUnit);
    const bool finite = std::isfinite(most);
    float scale = 0, inverse = 0;
    if (finite && plan.digits == 1 && most / 127.0f >= std::numeric_limits<float>::min()) {
      scale = most / 127.0f;
      inverse = 1.0f / scale;
    } else if (finite && plan.digits > 1 && most >= 4 * std::numeric_limits<float>::min()) {
      scale = std::ldexp(1.0f, std::ilogb(most) - 1);  // the largest number is below 4, and neither is subnormal
      inverse = 1.0f / scale;
    }
    int32_t sum = 0;
    for (int64_t u = 0; u < units; ++u) {
      uint16_t numbers[kUnit];
      int8_t rests_of_unit[kUnit];
      sum += kernels.split(from + u * kUnit, inverse, plan.digits == 1, numbers, rests_of_unit);
      place(numbers, rests_of_unit, parts_of(group, s * plan.span_units() + u), lane);
    }
    scales_of(group, s)[lane] = scale;
    starts_of(group, s)[lane] = -128 * sum;
    return finite;
  }

 private:
  void place(const uint16_t* numbers, const int8_t* rests_of_unit, uint8_t* unit, int64_t lane) const {
    const int64_t step = f8_step(rests);
    for (int64_t i = 0; i < kPairs; ++i) {
      std::memcpy(unit + i / 2 * step + i % 2 * 4 * kF8Columns + 4 * lane, numbers + f8_pair(i), 4);
    }
    for (int64_t i = 0; rests && i < kSteps; ++i) {
      std::memcpy(unit + i * step + 8 * kF8Columns + 4 * lane, rests_of_unit + 4 * i, 4);
    }
  }
};

struct F8Product : Codes {
  static constexpr int64_t kLd = kRunUnits * kF8Unit + 64;  // rows a power of 2 apart would share cache sets
  const F8Tiles& b;
  Output<float> c;

  int64_t ld() const { return b.groups() * kF8Columns + 16; }
  int64_t scratch_size(int64_t rows) const {
    return rows * ld() + kStepRows * (kRunUnits + kLd / 4) + round_up(kRunUnits, kFewLanes);
  }

  void expand(int64_t row, int64_t unit, int64_t units, uint8_t* to) const {
    if (row >= m) {
      std::memset(to, 0, units * kF8Unit);
      return;
    }
    const bool ragged = unit + units == plan.units() && plan.depth % kUnit != 0;
    b.kernels.expand(at(row, unit), units - ragged, to);
    if (!ragged) return;
    uint8_t last[kUnit];
    copy_last(row, plan.units() - 1, last);
    b.kernels.expand(last, 1, to + (units - 1) * kF8Unit);
  }

  void multiply(int64_t row, int64_t rows, float* scratch) const {
    const int64_t end = row + round_up(rows, kStepRows);
    float *sums = scratch, *scales = sums + (end - row) * ld();
    float* row_scales = scales + kStepRows * kRunUnits;
    uint8_t* numbers = reinterpret_cast<uint8_t*>(row_scales + round_up(kRunUnits, kFewLanes));
    std::fill(sums, scales, 0.0f);
    for (int64_t unit = 0; unit < plan.units(); unit += kRunUnits) {
      const int64_t units = std::min(kRunUnits, plan.units() - unit), first = unit / plan.span_units();
      const int64_t spans = ceil_div(units, plan.span_units());
      for (int64_t i = row; i < end; i += kStepRows) {
        for (int64_t r = 0; r < kStepRows; ++r) {
          expand(i + r, unit, units, numbers + r * kLd);
          copy_scales(i + r, plan.span, first, spans, row_scales);
          for (int64_t s = 0; s < spans; ++s) scales[s * kStepRows + r] = row_scales[s];
        }
        CodesAhead next = ahead(i, row, end, kStepRows, unit, kRunUnits, spans * b.groups());
        for (int64_t g = 0; g < b.groups(); ++g) {
          for (int64_t s = 0; s < spans; ++s) {
            next.fetch();
            const int64_t u = s * plan.span_units();
            for (int64_t r = 0; r < kStepRows; r += kF8Rows) {
              b.kernels.tile(numbers + r * kLd + u * kF8Unit, kLd, b.parts_of(g, unit + u), b.rests,
                             std::min(plan.span_units(), units - u), b.starts_of(g, first + s),
                             scales + s * kStepRows + r, b.scales_of(g, first + s),
                             sums + (i + r - row) * ld() + g * kF8Columns, ld());
            }
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

struct ManyF8Queries : IntegerQueries {
  F8Tiles tiles;

  ManyF8Queries(const Plan& plan, bool rests) : tiles(plan, rests) {}
  void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const override {
    const F8Product product = {{tiles.plan, a, m}, tiles, c};
    const int64_t tasks = std::max<int64_t>(1, ceil_div(m, kMostRows * n_threads)) * n_threads;
    const int64_t task = std::max(kStepRows, round_up(ceil_div(m, tasks), kStepRows));
    multiply_tasks(product, task, kStepRows, product.scratch_size(task), n_threads);
  }
};

}  // namespace

std::unique_ptr<IntegerQueries> pack_many_f8(const Plan& plan, const Rows& b, int n_threads) {
  const bool rests = plan.digits > 1 && b.number() != Dtype::kBF16;
  auto queries = std::make_unique<ManyF8Queries>(plan, rests);
  const F8Tiles& tiles = queries->tiles;
  const auto pack = [&](int64_t query, int64_t s, float* x) { return tiles.pack(b, query, s, x); };
  if (!pack_spans(plan, pack, n_threads)) return nullptr;
  return queries;
}

}  // namespace lgk
