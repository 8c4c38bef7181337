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

constexpr int64_t kQueries = 64;    // packed at a time, which bounds their copy to 3 kQueries depth bytes
constexpr int64_t kRunUnits = 16;   // units of kTileCodes rows that are expanded at a time, into the L1 cache
constexpr int64_t kMostRows = 192;  // rows whose sums a thread holds in the L2 cache
constexpr int64_t kMostDigits = 3;
constexpr double kLargest[kMostDigits + 1] = {0, 127, 127 * 256,
                                              127 * 65536};  // whole numbers; their digits stay within a byte

// How a product is cut. A column is one digit of one query.
struct Plan {
  Code code;
  int64_t depth, queries;
  int digits;
  int64_t span;  // numbers

  int64_t columns() const { return queries * digits; }
  int64_t units() const { return ceil_div(depth, kUnit); }
  int64_t span_units() const { return span / kUnit; }
  int64_t spans() const { return ceil_div(depth, span); }
};

// Queries in digits: groups of `width` columns, each with its units, span starts and span scales.
struct Columns {
  const Plan& plan;
  int64_t width;
  bool interleaved;  // four numbers of each column of a group in turn, or a column's whole unit
  Buffer<int8_t> digits;
  Buffer<int32_t> starts;
  Buffer<float> scales;

  Columns(const Plan& plan, int64_t width, bool interleaved)
      : plan(plan),
        width(width),
        interleaved(interleaved),
        digits(groups() * width * plan.units() * kUnit),
        starts(groups() * width * plan.spans() * start_lanes()),
        scales(groups() * width * plan.spans()) {
    if (plan.columns() % width == 0) return;
    const int64_t last = groups() - 1;
    std::memset(digits_of(last), 0, width * plan.units() * kUnit);
    std::memset(starts_of(last), 0, width * plan.spans() * start_lanes() * sizeof(int32_t));
    std::memset(scales_of(last), 0, width * plan.spans() * sizeof(float));
  }

  // Rows side by side have a sum for each lane, and none may grow large beside the others.
  int64_t start_lanes() const { return interleaved ? 1 : kLaneSums; }
  int64_t groups() const { return ceil_div(plan.columns(), width); }
  int8_t* digits_of(int64_t group) const { return digits.data() + group * width * plan.units() * kUnit; }
  int32_t* starts_of(int64_t group) const { return starts.data() + group * width * plan.spans() * start_lanes(); }
  float* scales_of(int64_t group) const { return scales.data() + group * width * plan.spans(); }

  void place(int64_t column, int64_t unit, const int8_t* from) const {
    const int64_t group = column / width, lane = column % width;
    int8_t* to = digits_of(group) + unit * width * kUnit;
    if (!interleaved) {
      std::memcpy(to + lane * kUnit, from, kUnit);
      return;
    }
    for (int64_t k = 0; k < kUnit / 4; ++k) std::memcpy(to + (k * width + lane) * 4, from + 4 * k, 4);
  }

  // Packs one span of a query; false if it holds NaN or Inf. x: kMostSpan numbers for each row of a row tile.
  bool pack(const IntegerKernels& kernels, const Rows& b, int64_t query, int64_t s, float* x) const {
    const int64_t start = s * plan.span, n = std::min(plan.span, plan.depth - start);
    lgk::kernels<float>().pack_rows(b, query, 1, start, n, x, kMostSpan);
    std::fill(x + n, x + round_up(n, kUnit), 0.0f);
    const float most = kernels.largest(x, n);
    const float unit = static_cast<float>(most / kLargest[plan.digits]);
    const bool some = unit >= std::numeric_limits<float>::min() && std::isfinite(most);
    int8_t found[kMostDigits * kUnit];
    int32_t sums[kMostDigits * kLaneSums] = {};
    for (int64_t u = 0; u * kUnit < n; ++u) {
      kernels.to_digits(plan.code, x + u * kUnit, some ? 1.0f / unit : 0.0f, plan.digits, found, sums);
      for (int d = 0; d < plan.digits; ++d) {
        place(query * plan.digits + d, start / kUnit + u, found + d * kUnit);
      }
    }
    for (int d = 0; d < plan.digits; ++d) {
      const int64_t column = query * plan.digits + d, at = s * width + column % width;
      int32_t* starts_here = starts_of(column / width) + at * start_lanes();
      std::fill(starts_here, starts_here + start_lanes(), 0);
      for (int64_t lane = 0; lane < kLaneSums; ++lane) {
        starts_here[lane % start_lanes()] -= offset_of(plan.code) * sums[d * kLaneSums + lane];
      }
      scales_of(column / width)[at] = some ? std::ldexp(unit, 8 * d) : 0.0f;
    }
    return std::isfinite(most);
  }
};

struct Product {
  const IntegerKernels& kernels;
  const Plan& plan;
  const EncodedRows& a;
  const Columns& b;
  int64_t m;
  Output<float> c;

  // The scales of a row's spans from `first` on, `step` apart; rows beyond the last have none.
  void copy_scales(int64_t row, int64_t first, int64_t count, float* to, int64_t step) const {
    const int shift = __builtin_ctzll(a.encoding.block / plan.span);  // spans may share a scale
    const int64_t at = row * a.scale_stride;
    const auto* halves = static_cast<const uint16_t*>(a.scales) + at;
    const auto* floats = static_cast<const float*>(a.scales) + at;
    for (int64_t s = 0; s < count; ++s) {
      const int64_t block = (first + s) >> shift;
      to[s * step] = row >= m ? 0.0f : a.encoding.half_scales ? float_of_half(halves[block]) : floats[block];
    }
  }
  // A row's last unit, filled up so that it can be read whole.
  void copy_last(int64_t row, uint8_t* to) const {
    const int64_t from = (plan.units() - 1) * a.encoding.bytes(kUnit), bytes = a.encoding.bytes(plan.depth) - from;
    std::memset(to, 0, kUnit);
    if (row < m) std::memcpy(to, a.codes + row * a.code_stride + from, bytes);
  }

  int64_t wide_scratch(int64_t rows) const {
    return round_up(rows * (b.groups() * b.width + 16) + kTileCodes * (kRunUnits * kUnit / 4 + 16 + kRunUnits),
                    kCacheLine);
  }
  void multiply_wide(int64_t row, int64_t rows, float* scratch) const;
  void expand(int64_t row, int64_t unit, int64_t units, uint8_t* to) const;
  void write(int64_t row, int64_t rows, const float* sums, int64_t ld) const;

  int64_t narrow_scratch() const { return round_up(plan.spans() * kFewRows + kFewRows * kUnit / 4, kCacheLine); }
  void multiply_narrow(int64_t row, float* scratch) const;
};

void Product::expand(int64_t row, int64_t unit, int64_t units, uint8_t* to) const {
  if (row >= m) {
    std::memset(to, 0, units * kUnit);
    return;
  }
  const uint8_t* from = a.codes + row * a.code_stride + unit * a.encoding.bytes(kUnit);
  const bool ragged = unit + units == plan.units() && plan.depth % kUnit != 0;
  kernels.expand(plan.code, from, units - ragged, kTileCodes * a.code_stride, to);
  if (ragged) {
    uint8_t last[kUnit];
    copy_last(row, last);
    kernels.expand(plan.code, last, 1, 0, to + (units - 1) * kUnit);
  }
}

// A query's score is the sum of its digits' products.
void Product::write(int64_t row, int64_t rows, const float* sums, int64_t ld) const {
  for (int64_t q = 0; q < plan.queries; ++q) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = sums + r * ld + q * plan.digits;
      float sum = from[0];
      for (int d = 1; d < plan.digits; ++d) sum += from[d];
      c.data[(row + r) * c.row_stride + q * c.column_stride] = sum;
    }
  }
}

void Product::multiply_wide(int64_t row, int64_t rows, float* scratch) const {
  constexpr int64_t kLd = kRunUnits * kUnit + 64;  // rows a power of 2 apart would share cache sets
  const int64_t ld = b.groups() * b.width + 16, padded = round_up(rows, kTileCodes);
  float *sums = scratch, *a_scale = sums + padded * ld;
  uint8_t* codes = reinterpret_cast<uint8_t*>(a_scale + kTileCodes * kRunUnits);
  std::fill(sums, sums + padded * ld, 0.0f);
  for (int64_t unit = 0; unit < plan.units(); unit += kRunUnits) {
    const int64_t units = std::min(kRunUnits, plan.units() - unit), first = unit / plan.span_units();
    for (int64_t i = 0; i < padded; i += kTileCodes) {
      for (int64_t r = 0; r < kTileCodes; ++r) {
        expand(row + i + r, unit, units, codes + r * kLd);
        copy_scales(row + i + r, first, ceil_div(units, plan.span_units()), a_scale + r, kTileCodes);
      }
      for (int64_t g = 0; g < b.groups(); ++g) {
        for (int64_t s = 0; s * plan.span_units() < units; ++s) {
          const int64_t u = s * plan.span_units(), at = (first + s) * b.width;
          kernels.tile(codes + u * kUnit, kLd, b.digits_of(g) + (unit + u) * b.width * kUnit,
                       std::min(plan.span_units(), units - u), b.starts_of(g) + at, a_scale + s * kTileCodes,
                       b.scales_of(g) + at, sums + i * ld + g * b.width, ld);
        }
      }
    }
  }
  write(row, std::min(rows, m - row), sums, ld);
}

void Product::multiply_narrow(int64_t row, float* scratch) const {
  float* a_scale = scratch;
  uint8_t* last = reinterpret_cast<uint8_t*>(scratch + plan.spans() * kFewRows);
  const uint8_t *rows[kFewRows], *ends[kFewRows];
  for (int64_t r = 0; r < kFewRows; ++r) {
    rows[r] = a.codes + std::min(row + r, m - 1) * a.code_stride;
    ends[r] = last + r * kUnit;
    copy_last(row + r, last + r * kUnit);
    copy_scales(row + r, 0, plan.spans(), a_scale + r, kFewRows);
  }
  float sums[kFewRows * kFewColumns * kMostDigits];
  const int64_t ld = kFewColumns * kMostDigits;
  for (int64_t g = 0; g < b.groups(); ++g) {
    float found[kFewRows * kFewQueries];
    kernels.few(plan.code, rows, ends, plan.units(), plan.span_units(), a_scale, b.digits_of(g), b.starts_of(g),
                b.scales_of(g), b.width, found);
    for (int64_t r = 0; r < kFewRows; ++r) {
      for (int64_t j = 0; j < b.width && g * b.width + j < plan.columns(); ++j) {
        sums[r * ld + g * b.width + j] = found[r * b.width + j];
      }
    }
  }
  write(row, std::min(kFewRows, m - row), sums, ld);
}

// Rows of a task: every thread gets as many tasks as the next, and a task's sums fit the cache.
int64_t rows_of_task(int64_t m, int n_threads) {
  const int64_t tasks = std::max<int64_t>(1, ceil_div(m, kMostRows * n_threads)) * n_threads;
  return std::max(kTileCodes, round_up(ceil_div(m, tasks), kTileCodes));
}

bool multiply_columns(const EncodedRows& a, int64_t m, const Rows& b, const Plan& plan, Output<float> c,
                      int n_threads) {
  const IntegerKernels& kernels = *integer_kernels();
  const bool narrow = plan.queries <= kFewColumns;
  const int64_t fewest = std::min(plan.columns(), kFewQueries);
  const Columns columns(plan, narrow ? fewest : kTileQueries, !narrow);
  const Product product = {kernels, plan, a, columns, m, c};
  const int64_t task = narrow ? kFewRows : rows_of_task(m, n_threads);
  const int64_t packing = lgk::kernels<float>().row_tile * kMostSpan + kMostSpan;
  const int64_t size =
      round_up(std::max(packing, narrow ? product.narrow_scratch() : product.wide_scratch(task)), kCacheLine);
  const Buffer<float> scratch(size * n_threads);
  std::atomic<bool> finite{true};

#pragma omp parallel num_threads(n_threads)
  {
    float* mine = scratch.data() + size * omp_get_thread_num();
#pragma omp for schedule(static)
    for (int64_t s = 0; s < plan.spans(); ++s) {
      for (int64_t q = 0; q < plan.queries; ++q) {
        if (!columns.pack(kernels, b, q, s, mine)) finite = false;
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < m; i += task) {
      if (!finite) continue;
      if (narrow) {
        product.multiply_narrow(i, mine);
      } else {
        product.multiply_wide(i, std::min(task, m - i), mine);
      }
    }
  }
  return finite;
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
