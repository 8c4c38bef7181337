// Many queries meet fp8 rows as numbers of bf16, and what their own rounding to bf16 leaves as bytes.
#include <algorithm>
#include <cstring>

#include "encoded/f8.h"
#include "encoded/many_product.h"

namespace lgk {
namespace {

constexpr int64_t kPairs = kUnit / 2;

// f8_pair of each.
struct Order {
  uint8_t from[kPairs] = {};
  constexpr Order() {
    for (int64_t i = 0; i < kPairs; ++i) from[i] = static_cast<uint8_t>(f8_pair(i));
  }
};

// Queries in groups, each with its units, span starts and span scales.
struct F8Tiles {
  Plan plan;
  bool rests;
  const F8Kernels& kernels = *f8_kernels();
  const F8Layout layout{kernels.rests_apart, rests};
  Buffer<uint8_t> parts;
  Buffer<int32_t> starts;
  Buffer<float> scales;

  F8Tiles(const Plan& plan, bool rests)
      : plan(plan),
        rests(rests),
        parts(groups() * group_bytes()),
        starts(groups() * kTileColumns * plan.spans()),
        scales(groups() * kTileColumns * plan.spans()) {
    if (plan.queries % kTileColumns == 0) return;
    std::memset(parts_of(groups() - 1, 0), 0, group_bytes());
    std::memset(starts_of(groups() - 1, 0), 0, kTileColumns * plan.spans() * sizeof(int32_t));
    std::memset(scales_of(groups() - 1, 0), 0, kTileColumns * plan.spans() * sizeof(float));
  }

  int64_t groups() const { return ceil_div(plan.queries, kTileColumns); }
  int64_t columns() const { return kTileColumns; }
  int64_t group_bytes() const { return plan.units() * layout.unit; }
  uint8_t* parts_of(int64_t group, int64_t unit) const {
    return parts.data() + group * group_bytes() + unit * layout.unit;
  }
  int32_t* starts_of(int64_t group, int64_t s) const {
    return starts.data() + (group * plan.spans() + s) * kTileColumns;
  }
  float* scales_of(int64_t group, int64_t s) const { return scales.data() + (group * plan.spans() + s) * kTileColumns; }

  void expand(const uint8_t* codes, int64_t units, uint8_t* to) const { kernels.expand(codes, units, to); }
  void tile(int64_t group, int64_t s, int64_t unit, int64_t units, const uint8_t* rows, int64_t ld_rows,
            const float* row_scales, float* sums, int64_t ld, Pending& pending) const {
    kernels.tile(rows, ld_rows, parts_of(group, unit), rests, units, starts_of(group, s), row_scales,
                 scales_of(group, s), sums, ld, pending);
  }
  void finish(int64_t ld, Pending& pending) const { kernels.finish(rests, ld, pending); }

  // False if the span holds NaN or Inf.
  bool pack(const Rows& b, int64_t query, int64_t s, float* x) const {
    const float* from = span_numbers(plan, b, query, s, x);
    const int64_t units = plan.units_of(s), group = query / kTileColumns, lane = query % kTileColumns;
    const F8Scale scale(integer_kernels()->largest(from, units * kUnit), plan.digits == 1);
    if (!scale.finite) return false;
    int32_t sum = 0;
    for (int64_t u = 0; u < units; ++u) {
      uint16_t numbers[kUnit];
      int8_t rests_of_unit[kUnit];
      sum += kernels.split(from + u * kUnit, scale.inverse, plan.digits == 1, numbers, rests_of_unit);
      place(numbers, rests_of_unit, parts_of(group, s * plan.span_units() + u), lane);
    }
    scales_of(group, s)[lane] = scale.of_one;
    starts_of(group, s)[lane] = -128 * sum;
    return true;
  }

 private:
  void place(const uint16_t* numbers, const int8_t* rests_of_unit, uint8_t* unit, int64_t lane) const {
    static constexpr Order kOrder;
    for (int64_t i = 0; i < kPairs; ++i) {
      std::memcpy(unit + i / 2 * layout.step + (i % 2 * kTileColumns + lane) * 4, numbers + kOrder.from[i], 4);
    }
    for (int64_t i = 0; rests && i < kF8Steps; ++i) {
      std::memcpy(unit + layout.first_rest + i * layout.rest_step + 4 * lane, rests_of_unit + 4 * i, 4);
    }
  }
};

struct ManyF8Queries : IntegerQueries {
  F8Tiles tiles;

  ManyF8Queries(const Plan& plan, bool rests) : tiles(plan, rests) {}
  void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const override {
    multiply_many(tiles, a, m, c, n_threads);
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
