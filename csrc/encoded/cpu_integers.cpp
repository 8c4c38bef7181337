#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/buffer.h"
#include "common/kernels.h"
#include "common/threads.h"
#include "encoded/integers.h"
#include "encoded/kernels.h"
#include "encoded/product.h"

namespace lgk {
namespace {

constexpr int64_t kQueries = 64;    // packed at a time, which bounds their copy to kMostDigits kQueries depth bytes
constexpr int64_t kRunUnits = 16;   // units of kTileCodes rows that are expanded at a time, into the L1 cache
constexpr int64_t kMostRows = 192;  // rows whose sums a thread holds in the L2 cache
constexpr int64_t kTaskRows = 16;   // rows that meet a few queries before the next units do
constexpr double kLargest[kMostDigits + 1] = {0, 127, 127 * 256};  // whole numbers; their digits stay within a byte

// How a product is cut.
struct Plan {
  Code code;
  int64_t depth, queries;
  int digits;
  int64_t span;  // numbers

  int64_t units() const { return ceil_div(depth, kUnit); }
  int64_t span_units() const { return span / kUnit; }
  int64_t spans() const { return ceil_div(depth, span); }
};

// One span of a query in fixed point.
struct Span {
  float unit;  // 0 where all numbers are, or are not finite
  int64_t units;
  int8_t digits[kMostSpan / kUnit][kMostDigits * kUnit];
  int32_t sums[kMostSpan / kUnit][kMostDigits];
};

// Packs one span of a query; false if it holds NaN or Inf. x: kMostSpan numbers for each row of a row tile.
bool pack_span(const IntegerKernels& kernels, const Plan& plan, const Rows& b, int64_t query, int64_t s, float* x,
               Span& to) {
  const int64_t start = s * plan.span, n = std::min(plan.span, plan.depth - start);
  lgk::kernels<float>().pack_rows(b, query, 1, start, n, x, kMostSpan);
  to.units = ceil_div(n, kUnit);
  std::fill(x + n, x + to.units * kUnit, 0.0f);
  const float most = kernels.largest(x, n);
  const float unit = static_cast<float>(most / kLargest[plan.digits]);
  const bool some = unit >= std::numeric_limits<float>::min() && std::isfinite(most);
  to.unit = some ? unit : 0.0f;
  for (int64_t u = 0; u < to.units; ++u) {
    kernels.to_digits(plan.code, x + u * kUnit, some ? 1.0f / unit : 0.0f, plan.digits, to.digits[u], to.sums[u]);
  }
  return std::isfinite(most);
}

// Queries as tiles take them: groups, each with its units, span starts and span scales.
struct Tiles {
  const Plan& plan;
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

// A few queries in groups, each with its units, and every unit with its scale and what the codes' offset adds to it.
struct Columns {
  const Plan& plan;
  int64_t width, ld;  // queries of a group; units, padded
  Buffer<int8_t> digits;
  Buffer<float> scales, sums;

  explicit Columns(const Plan& plan)
      : plan(plan),
        width(ceil_div(plan.queries, ceil_div(plan.queries, kFewQueries))),
        ld(round_up(plan.units(), kFewLanes)),
        digits(groups() * width * plan.digits * plan.units() * kUnit),
        scales(groups() * width * ld),
        sums(groups() * width * ld) {
    std::fill_n(scales.data(), groups() * width * ld, 0.0f);
    std::fill_n(sums.data(), groups() * width * ld, 0.0f);
    if (plan.queries % width == 0) return;
    std::memset(digits_of(groups() - 1, 0), 0, width * plan.digits * plan.units() * kUnit);
  }

  int64_t groups() const { return ceil_div(plan.queries, width); }
  int8_t* digits_of(int64_t group, int64_t unit) const {
    return digits.data() + (group * plan.units() + unit) * width * plan.digits * kUnit;
  }

  void place(int64_t query, int64_t s, const Span& from) const {
    for (int64_t u = 0; u < from.units; ++u) {
      const int64_t unit = s * plan.span_units() + u;
      std::memcpy(digits_of(query / width, unit) + query % width * plan.digits * kUnit, from.digits[u],
                  plan.digits * kUnit);
      int64_t sum = from.sums[u][0];
      for (int d = 1; d < plan.digits; ++d) sum += int64_t{256} * from.sums[u][d];
      scales.data()[query * ld + unit] = from.unit;
      sums.data()[query * ld + unit] = from.unit * static_cast<float>(offset_of(plan.code) * sum);
    }
  }
};

// What both ways need of the rows.
struct Codes {
  const IntegerKernels& kernels;
  const Plan& plan;
  const EncodedRows& a;
  int64_t m;

  const uint8_t* at(int64_t row, int64_t unit) const {
    return a.codes + row * a.code_stride + unit * a.encoding.bytes(kUnit);
  }

  // The scales of pieces first .. first + count - 1 of a row, `size` numbers each; rows beyond the last have none.
  void copy_scales(int64_t row, int64_t size, int64_t first, int64_t count, float* to) const {
    if (row >= m) {
      std::fill(to, to + count, 0.0f);
      return;
    }
    const int shift = __builtin_ctzll(a.encoding.block / size);  // pieces may share a scale
    const int64_t at = row * a.scale_stride + (first >> shift);
    const auto* floats = static_cast<const float*>(a.scales) + at;
    if (a.encoding.half_scales) {
      kernels.widen(static_cast<const uint16_t*>(a.scales) + at, ((first + count - 1) >> shift) - (first >> shift) + 1,
                    to);
      floats = to;
    }
    if (shift == 0) {
      if (floats != to) std::copy(floats, floats + count, to);
      return;
    }
    for (int64_t i = count - 1; i >= 0; --i) to[i] = floats[((first + i) >> shift) - (first >> shift)];
  }

  // A row's last unit, filled up so that it can be read whole.
  void copy_last(int64_t row, uint8_t* to) const {
    const int64_t unit = plan.units() - 1;
    std::memset(to, 0, kUnit);
    if (row < m) std::memcpy(to, at(row, unit), a.encoding.bytes(plan.depth) - unit * a.encoding.bytes(kUnit));
  }
};

// The cache lines of some rows' units, which are fetched a few at a time.
struct Ahead {
  const uint8_t* first;
  int64_t stride, lines, count, step, at = 0;

  void fetch() {
    for (const int64_t end = std::min(count, at + step); at < end; ++at) {
      __builtin_prefetch(first + at / lines * stride + at % lines * kCacheLine, 0, 2);
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
      copy_last(row, last);
      kernels.expand(plan.code, last, 1, to + (units - 1) * kUnit);
    }
  }

  // The rows after these, or the units after them.
  Ahead ahead(int64_t row, int64_t first, int64_t end, int64_t unit, int64_t tiles) const {
    const bool on = row + kTileCodes < end;
    const int64_t bytes = std::min(kRunUnits, plan.units() - unit) * a.encoding.bytes(kUnit);
    const int64_t lines = ceil_div(bytes, kCacheLine), count = kTileCodes * lines;
    const uint8_t* from = on ? at(row + kTileCodes, unit) : at(first, std::min(unit + kRunUnits, plan.units() - 1));
    return {from, a.code_stride, lines, count, ceil_div(count, tiles)};
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
        Ahead next = ahead(i, row, end, unit, spans * b.groups());
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

struct NarrowProduct : Codes {
  const Columns& b;
  Output<float> c;

  // Sums of a task's rows, then the scales and last units of kFewRows.
  int64_t sums_size() const { return kTaskRows * b.groups() * b.width * kFewLanes; }
  int64_t scratch_size() const { return sums_size() + kFewRows * (kFewUnits + kUnit / 4); }

  void multiply(int64_t row, int64_t rows, float* scratch) const {
    for (int64_t unit = 0; unit < plan.units(); unit += kFewUnits) {
      for (int64_t r = 0; r < rows; r += kFewRows) multiply_units(row, r, unit, scratch);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t q = 0; q < plan.queries; ++q) {
        float* lane =
            sums_of(scratch, r - r % kFewRows, q / b.width) + (r % kFewRows * b.width + q % b.width) * kFewLanes;
        for (int64_t half = kFewLanes / 2; half > 0; half /= 2) {
          for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
        }
        c.data[(row + r) * c.row_stride + q * c.column_stride] = lane[0];
      }
    }
  }

 private:
  float* sums_of(float* scratch, int64_t r, int64_t group) const {
    return scratch + (r * b.groups() + group * kFewRows) * b.width * kFewLanes;
  }

  void multiply_units(int64_t row, int64_t r, int64_t unit, float* scratch) const {
    const int64_t units = std::min(kFewUnits, plan.units() - unit);
    const bool ragged = unit + units == plan.units() && plan.depth % kUnit != 0;
    float* a_scale = scratch + sums_size();
    uint8_t* last = reinterpret_cast<uint8_t*>(a_scale + kFewRows * kFewUnits);
    const uint8_t *from[kFewRows], *ends[kFewRows];
    for (int64_t i = 0; i < kFewRows; ++i) {
      from[i] = at(std::min(row + r + i, m - 1), unit);
      ends[i] = last + i * kUnit;
      if (ragged) copy_last(row + r + i, last + i * kUnit);
      copy_scales(row + r + i, kUnit, unit, units, a_scale + i * kFewUnits);
      std::fill(a_scale + i * kFewUnits + units, a_scale + i * kFewUnits + round_up(units, kFewLanes), 0.0f);
    }
    for (int64_t g = 0; g < b.groups(); ++g) {
      const int64_t at = g * b.width * b.ld + unit;
      kernels.few(plan.code, from, ragged ? ends : nullptr, units, a_scale, b.digits_of(g, unit), plan.digits,
                  b.scales.data() + at, b.sums.data() + at, b.ld, b.width, sums_of(scratch, r, g), unit > 0);
    }
  }
};

// Rows of a task: every thread gets as many tasks as the next, and a task's sums fit the cache.
int64_t rows_of_task(int64_t m, int64_t most, int64_t step, int n_threads) {
  const int64_t tasks = std::max<int64_t>(1, ceil_div(m, most * n_threads)) * n_threads;
  return std::max(step, round_up(ceil_div(m, tasks), step));
}

// Packs the queries, then multiplies tasks of rows by them; false if a query holds NaN or Inf.
template <class Packed, class Product>
bool run(const Packed& packed, const Product& product, const Rows& b, int64_t task, int64_t scratch_size,
         int n_threads) {
  const Plan& plan = packed.plan;
  const int64_t packing = lgk::kernels<float>().row_tile * kMostSpan + kMostSpan;
  const int64_t size = round_up(std::max(packing, scratch_size), kCacheLine);
  const Buffer<float> scratch(size * n_threads);
  std::atomic<bool> finite{true};

#pragma omp parallel num_threads(n_threads)
  {
    float* mine = scratch.data() + size * omp_get_thread_num();
#pragma omp for schedule(static)
    for (int64_t s = 0; s < plan.spans(); ++s) {
      for (int64_t q = 0; q < plan.queries; ++q) {
        Span span;
        if (!pack_span(product.kernels, plan, b, q, s, mine, span)) finite = false;
        packed.place(q, s, span);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < product.m; i += task) {
      if (finite) product.multiply(i, std::min(task, product.m - i), mine);
    }
  }
  return finite;
}

bool multiply_columns(const EncodedRows& a, int64_t m, const Rows& b, const Plan& plan, Output<float> c,
                      int n_threads) {
  const Codes codes = {*integer_kernels(), plan, a, m};
  if (plan.queries <= kFewColumns) {
    const Columns columns(plan);
    const NarrowProduct product = {codes, columns, c};
    return run(columns, product, b, rows_of_task(m, kTaskRows, kFewRows, n_threads), product.scratch_size(), n_threads);
  }
  const Tiles tiles(plan);
  const WideProduct product = {codes, tiles, c};
  const int64_t task = rows_of_task(m, kMostRows, kTileCodes, n_threads);
  return run(tiles, product, b, task, product.scratch_size(task), n_threads);
}

}  // namespace

bool multiply_integers(const EncodedRows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<float> c,
                       int digits, int n_threads) {
  const Encoding& encoding = a.encoding;
  if (integer_kernels() == nullptr || encoding.code == Code::kF8 || encoding.block < kUnit) return false;
  n_threads = threads_for(double(m) * n * depth, n_threads);
  for (int64_t q = 0; q < n; q += kQueries) {
    const Plan plan = {encoding.code, depth, std::min(kQueries, n - q), digits, std::min(encoding.block, kMostSpan)};
    if (!multiply_columns(a, m, b.from(q), plan, {c.data + q * c.column_stride, c.row_stride, c.column_stride},
                          n_threads)) {
      return false;
    }
  }
  return true;
}

}  // namespace lgk
