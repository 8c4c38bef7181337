// What products of integer codes with many and with few queries have in common.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>

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
               Span& to);

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

// c[i][q] for the plan's queries; false if one holds NaN or Inf.
bool multiply_few_integers(const Codes& codes, const Rows& b, Output<float> c, int n_threads);

}  // namespace lgk
