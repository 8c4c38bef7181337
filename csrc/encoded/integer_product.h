// What products of integer codes with many and with few queries have in common.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "common/amx.h"
#include "common/buffer.h"
#include "common/kernels.h"
#include "common/product.h"
#include "encoded/integers.h"

namespace lgk {

// How a product is cut.
struct Plan {
  Code code;
  int64_t depth, queries;
  int digits;
  int64_t span;    // numbers
  double largest;  // whole number that a query's become

  bool of_int8() const { return largest <= 127; }
  int64_t units() const { return ceil_div(depth, kUnit); }
  int64_t span_units() const { return span / kUnit; }
  int64_t spans() const { return ceil_div(depth, span); }
  int64_t units_of(int64_t s) const { return std::min(span_units(), units() - s * span_units()); }
};

// One span of a query in fixed point.
struct Span {
  float unit;  // 0 where all numbers are, or are not finite
  int64_t units;
  int8_t digits[kMostSpan / kUnit][kMostDigits * kUnit];
  int32_t sums[kMostSpan / kUnit][kMostDigits];
};

// A span of a query in fp32, with zeros to whole units; x: room for kMostSpan numbers for each row of a row tile.
const float* span_numbers(const Plan& plan, const Rows& b, int64_t query, int64_t s, float* x);

// Packs one span of a query; false if it holds NaN or Inf.
bool pack_span(const Plan& plan, const Rows& b, int64_t query, int64_t s, float* x, Span& to);

// The cache lines of some rows' units, which are fetched a few at a time.
struct CodesAhead {
  const uint8_t* row;
  int64_t stride, row_bytes, left, step, at = 0;

  void fetch() {
    for (int64_t lines = std::min(step, left); lines > 0; --lines, --left) {
      __builtin_prefetch(row + at, 0, 2);
      at += kCacheLine;
      if (at == row_bytes) {
        at = 0;
        row += stride;
      }
    }
  }
};

// What all ways need of the rows.
struct Codes {
  const Plan& plan;
  const EncodedRows& a;
  int64_t m;
  const IntegerKernels& kernels = *integer_kernels();

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

  // Scales of whole units, copied only where they do not lie so.
  bool scales_lie_whole() const { return a.encoding.block == kUnit && !a.encoding.half_scales; }
  const float* whole_scales(int64_t row, int64_t unit) const {
    return static_cast<const float*>(a.scales) + row * a.scale_stride + unit;
  }
  const float* scales_of(int64_t row, int64_t unit, int64_t units, float* copy) const {
    if (scales_lie_whole()) return whole_scales(row, unit);
    copy_scales(row, kUnit, unit, units, copy);
    return copy;
  }

  // What is read after `step` rows of first .. end - 1 and `run` units of theirs: the rows after these, or the units
  // after them. It is fetched in so many calls.
  CodesAhead ahead(int64_t row, int64_t first, int64_t end, int64_t step, int64_t unit, int64_t run,
                   int64_t calls) const {
    const bool on = row + step < end;
    const int64_t bytes = round_up(std::min(run, plan.units() - unit) * a.encoding.bytes(kUnit), kCacheLine);
    const int64_t count = step * bytes / kCacheLine;
    const uint8_t* from = on ? at(row + step, unit) : at(first, std::min(unit + run, plan.units() - 1));
    return {from, a.code_stride, bytes, count, ceil_div(count, calls)};
  }

  // A row's codes from `unit` on, no more than kUnit bytes, filled up so that they can be read whole.
  void copy_last(int64_t row, int64_t unit, uint8_t* to) const {
    std::memset(to, 0, kUnit);
    if (row < m) std::memcpy(to, at(row, unit), a.encoding.bytes(plan.depth) - unit * a.encoding.bytes(kUnit));
  }
};

// pack(query, span, numbers of scratch) for every span of the queries; false if one of them is.
template <class Pack>
bool pack_spans(const Plan& plan, const Pack& pack, int n_threads) {
  const int64_t size = round_up(lgk::kernels<float>().row_tile * kMostSpan + kMostSpan, kCacheLine);
  const Buffer<float> scratch(size * n_threads);
  std::atomic<bool> finite{true};

#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t s = 0; s < plan.spans(); ++s) {
    for (int64_t q = 0; q < plan.queries; ++q) {
      if (!pack(q, s, scratch.data() + size * omp_get_thread_num())) finite = false;
    }
  }
  return finite;
}

// Places the digits of every span of b's queries; false if one holds NaN or Inf.
template <class Packed>
bool place_spans(const Packed& packed, const Rows& b, int n_threads) {
  const auto pack = [&](int64_t query, int64_t s, float* x) {
    Span span;
    const bool finite = pack_span(packed.plan, b, query, s, x, span);
    packed.place(query, s, span);
    return finite;
  };
  return pack_spans(packed.plan, pack, n_threads);
}

// Multiplies rows by the packed queries, in tasks of at most `task` rows that differ by one tile.
template <class Product>
void multiply_tasks(const Product& product, int64_t task, int64_t tile, int64_t scratch_size, int n_threads) {
  const int64_t size = round_up(scratch_size, kCacheLine), tasks = ceil_div(product.m, task);
  const auto first = [&](int64_t i) { return std::min(product.m, ceil_div(product.m, tile) * i / tasks * tile); };
  const Buffer<float> scratch(size * n_threads);
#pragma omp parallel num_threads(n_threads)
  {
    const TileScope tiles;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) {
      product.multiply(first(i), first(i + 1) - first(i), scratch.data() + size * omp_get_thread_num());
    }
  }
}

// The plan's queries, packed.
struct IntegerQueries {
  virtual ~IntegerQueries() = default;
  // c[i][q] for i < m.
  virtual void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const = 0;
};

// Null if a query holds NaN or Inf.
std::unique_ptr<IntegerQueries> pack_few_integers(const Plan& plan, const Rows& b, int n_threads);
std::unique_ptr<IntegerQueries> pack_many_integers(const Plan& plan, const Rows& b, int n_threads);
std::unique_ptr<IntegerQueries> pack_few_f8(const Plan& plan, const Rows& b, int n_threads);
std::unique_ptr<IntegerQueries> pack_many_f8(const Plan& plan, const Rows& b, int n_threads);
std::unique_ptr<IntegerQueries> pack_few_signs(const Plan& plan, const Rows& b, int n_threads);

// Whether few queries are faster on sign codes by tables of sums. The tables of one query must fit the cache: they are
// four times its digits, and otherwise rows are read in pieces, from which memory gives less.
bool tables_pay(const Plan& plan);

}  // namespace lgk
