#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/kernels.h"
#include "encoded/many_product.h"

namespace lgk {
namespace {

// Queries as tiles take them: groups, each with its units, span starts and span scales.
struct Tiles {
  Plan plan;
  int64_t width;  // queries of a group
  Buffer<int8_t> digits;
  Buffer<int32_t> starts;
  Buffer<float> scales;
  const IntegerTiles& kernels = integer_kernels()->many;

  explicit Tiles(const Plan& plan)
      : plan(plan),
        width(kTileColumns / plan.digits),
        digits(groups() * kTileColumns * plan.units() * kUnit),
        starts(groups() * kTileColumns * plan.spans()),
        scales(groups() * width * plan.spans()) {
    if (plan.queries % width == 0) return;
    const int64_t last = groups() - 1;
    std::memset(digits_of(last), 0, kTileColumns * plan.units() * kUnit);
    std::memset(starts_of(last), 0, kTileColumns * plan.spans() * sizeof(int32_t));
    std::memset(scales_of(last), 0, width * plan.spans() * sizeof(float));
  }

  int64_t groups() const { return ceil_div(plan.queries, width); }
  int64_t columns() const { return width; }
  int8_t* digits_of(int64_t group) const { return digits.data() + group * kTileColumns * plan.units() * kUnit; }
  int32_t* starts_of(int64_t group) const { return starts.data() + group * kTileColumns * plan.spans(); }
  float* scales_of(int64_t group) const { return scales.data() + group * width * plan.spans(); }

  void expand(const uint8_t* codes, int64_t units, uint8_t* to) const { kernels.expand(plan.code, codes, units, to); }
  void tile(int64_t group, int64_t s, int64_t unit, int64_t units, const uint8_t* rows, int64_t ld_rows,
            const float* row_scales, float* sums, int64_t ld, Pending& pending) const {
    kernels.tile(rows, ld_rows, digits_of(group) + unit * kTileColumns * kUnit, plan.digits, units,
                 starts_of(group) + s * kTileColumns, row_scales, scales_of(group) + s * width, sums, ld, pending);
  }
  void finish(int64_t ld, Pending& pending) const { kernels.finish(plan.digits, ld, pending); }

  void place(int64_t query, int64_t s, const Span& from) const {
    const int64_t group = query / width, lane = query % width;
    scales_of(group)[s * width + lane] = from.unit;
    for (int d = 0; d < plan.digits; ++d) {
      const int64_t column = d * width + lane;
      int32_t sum = 0;
      for (int64_t u = 0; u < from.units; ++u) {
        int8_t* to = digits_of(group) + ((s * plan.span_units() + u) * (kUnit / 4) * kTileColumns + column) * 4;
        for (int64_t k = 0; k < kUnit / 4; ++k) {
          std::memcpy(to + 4 * k * kTileColumns, from.digits[u] + d * kUnit + 4 * k, 4);
        }
        sum += from.sums[u][d];
      }
      starts_of(group)[s * kTileColumns + column] = -offset_of(plan.code) * sum;
    }
  }
};

struct ManyQueries : IntegerQueries {
  Tiles tiles;

  explicit ManyQueries(const Plan& plan) : tiles(plan) {}
  void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const override {
    multiply_many(tiles, a, m, c, n_threads);
  }
};

}  // namespace

const float* span_numbers(const Plan& plan, const Rows& b, int64_t query, int64_t s, float* x) {
  const int64_t start = s * plan.span, n = std::min(plan.span, plan.depth - start);
  if (b.dtype == Dtype::kF32 && b.column_stride == 1 && !b.rounded && n == plan.span) {
    const float* from = static_cast<const float*>(b.data) + b.offset(query) + start;
    for (int64_t i = 0; i < n; i += kCacheLine / 4) __builtin_prefetch(from + n + i);  // of the next span
    return from;
  }
  lgk::kernels<float>().pack_rows(b, query, 1, start, n, x, kMostSpan);
  std::fill(x + n, x + round_up(n, kUnit), 0.0f);
  return x;
}

bool pack_span(const Plan& plan, const Rows& b, int64_t query, int64_t s, float* x, Span& to) {
  const IntegerKernels& kernels = *integer_kernels();
  const float* from = span_numbers(plan, b, query, s, x);
  to.units = plan.units_of(s);
  const float most = kernels.largest(from, to.units * kUnit);
  const float unit = static_cast<float>(most / plan.largest);
  const bool some = unit >= std::numeric_limits<float>::min() && std::isfinite(most);
  to.unit = some ? unit : 0.0f;
  for (int64_t u = 0; u < to.units; ++u) {
    kernels.to_digits(plan.code, from + u * kUnit, some ? 1.0f / unit : 0.0f, plan.digits, to.digits[u], to.sums[u]);
  }
  return std::isfinite(most);
}

std::unique_ptr<IntegerQueries> pack_many_integers(const Plan& plan, const Rows& b, int n_threads) {
  auto queries = std::make_unique<ManyQueries>(plan);
  if (!place_spans(queries->tiles, b, n_threads)) return nullptr;
  return queries;
}

}  // namespace lgk
