// Few queries meet rows of integer codes as their digits.
#include <algorithm>
#include <cstring>

#include "encoded/few_product.h"

namespace lgk {
namespace {

constexpr int64_t kVector = 64;  // bytes

// A few queries in groups, each with its units, and every unit with its scale and what the codes' offset adds to it.
struct Columns {
  Plan plan;
  int64_t width, ld;  // queries of a group; units, padded
  Buffer<int8_t> digits;
  Buffer<float> scales, sums;
  const IntegerKernels& kernels = *integer_kernels();

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
  int64_t unit_bytes() const { return groups() * width * plan.digits * kUnit; }
  int64_t padded_units() const { return round_up(plan.units(), chunk_units(plan.code)); }
  int8_t* digits_of(int64_t group, int64_t unit) const {
    return digits.data() + (group * padded_units() + unit) * width * plan.digits * kUnit;
  }

  void few(int64_t group, int64_t unit, const uint8_t* const* rows, const uint8_t* const* last, int64_t units,
           const float* const* row_scales, float* out, bool add) const {
    const int64_t at = group * width * ld + unit;
    kernels.few(plan.code, rows, last, units, row_scales, digits_of(group, unit), plan.digits, scales.data() + at,
                sums.data() + at, ld, width, out, add);
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

struct FewQueries : IntegerQueries {
  Columns columns;

  explicit FewQueries(const Plan& plan) : columns(plan) {}
  void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const override {
    multiply_few_queries(columns, a, m, c, n_threads);
  }
};

}  // namespace

std::unique_ptr<IntegerQueries> pack_few_integers(const Plan& plan, const Rows& b, int n_threads) {
  auto queries = std::make_unique<FewQueries>(plan);
  if (!place_spans(queries->columns, b, n_threads)) return nullptr;
  return queries;
}

}  // namespace lgk
