#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/kernels.h"
#include "encoded/integer_product.h"

namespace lgk {
namespace {

constexpr int64_t kRunUnits = 16;   // units of kTileCodes rows that are expanded at a time, into the L1 cache
constexpr int64_t kMostRows = 288;  // rows whose sums a thread holds in the L2 cache
// Queries as tiles take them: groups, each with its units, span starts and span scales.
struct Tiles {
  Plan plan;
  int64_t width;  // queries of a group
  Buffer<int8_t> digits;
  Buffer<int32_t> starts;
  Buffer<float> scales;

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
  int8_t* digits_of(int64_t group) const { return digits.data() + group * kTileColumns * plan.units() * kUnit; }
  int32_t* starts_of(int64_t group) const { return starts.data() + group * kTileColumns * plan.spans(); }
  float* scales_of(int64_t group) const { return scales.data() + group * width * plan.spans(); }

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

struct WideProduct : Codes {
  static constexpr int64_t kLd = kRunUnits * kUnit + 64;  // rows a power of 2 apart would share cache sets
  const Tiles& b;
  Output<float> c;

  int64_t ld() const { return b.groups() * b.width + 16; }
  int64_t scratch_size(int64_t rows) const {
    return round_up(rows * ld() + kTileCodes * (kLd / 4 + kRunUnits + 1) + kRunUnits, kCacheLine);
  }

  void expand(int64_t row, int64_t unit, int64_t units, uint8_t* to) const {
    if (row >= m) {
      std::memset(to, 0, units * kUnit);
      return;
    }
    const bool ragged = unit + units == plan.units() && plan.depth % kUnit != 0;
    kernels.expand(plan.code, at(row, unit), units - ragged, to);
    if (ragged) {
      uint8_t last[kUnit];
      copy_last(row, plan.units() - 1, last);
      kernels.expand(plan.code, last, 1, to + (units - 1) * kUnit);
    }
  }

  void multiply(int64_t row, int64_t rows, float* scratch) const {
    const int64_t end = row + round_up(rows, kTileCodes);
    float *sums = scratch, *a_scale = sums + (end - row) * ld(), *scales = a_scale + kTileCodes * kRunUnits;
    uint8_t* codes = reinterpret_cast<uint8_t*>(scales + round_up(kRunUnits, kFewLanes));
    std::fill(sums, a_scale, 0.0f);
    for (int64_t unit = 0; unit < plan.units(); unit += kRunUnits) {
      const int64_t units = std::min(kRunUnits, plan.units() - unit), first = unit / plan.span_units();
      const int64_t spans = ceil_div(units, plan.span_units());
      for (int64_t i = row; i < end; i += kTileCodes) {
        for (int64_t r = 0; r < kTileCodes; ++r) {
          expand(i + r, unit, units, codes + r * kLd);
          copy_scales(i + r, plan.span, first, spans, scales);
          for (int64_t s = 0; s < spans; ++s) a_scale[s * kTileCodes + r] = scales[s];
        }
        CodesAhead next = ahead(i, row, end, kTileCodes, unit, kRunUnits, spans * b.groups());
        for (int64_t g = 0; g < b.groups(); ++g) {
          for (int64_t s = 0; s < spans; ++s) {
            next.fetch();
            const int64_t u = s * plan.span_units();
            kernels.tile(codes + u * kUnit, kLd, b.digits_of(g) + (unit + u) * kTileColumns * kUnit, plan.digits,
                         std::min(plan.span_units(), units - u), b.starts_of(g) + (first + s) * kTileColumns,
                         a_scale + s * kTileCodes, b.scales_of(g) + (first + s) * b.width,
                         sums + (i - row) * ld() + g * b.width, ld());
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

// Rows of a task: every thread gets as many tasks as the next, and a task's sums fit the cache.
int64_t rows_of_task(int64_t m, int n_threads) {
  const int64_t tasks = std::max<int64_t>(1, ceil_div(m, kMostRows * n_threads)) * n_threads;
  return std::max(kTileCodes, round_up(ceil_div(m, tasks), kTileCodes));
}

struct ManyQueries : IntegerQueries {
  Tiles tiles;

  explicit ManyQueries(const Plan& plan) : tiles(plan) {}
  void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const override {
    const WideProduct product = {{tiles.plan, a, m}, tiles, c};
    const int64_t task = rows_of_task(m, n_threads);
    multiply_tasks(product, task, kTileCodes, product.scratch_size(task), n_threads);
  }
};

constexpr double kLargest[kMostDigits + 1] = {0, 127, 127 * 256};  // whole numbers; their digits stay within a byte

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
  const float unit = static_cast<float>(most / kLargest[plan.digits]);
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
