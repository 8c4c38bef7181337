// Few queries meet fp8 rows as numbers of bf16, and what their own rounding to bf16 leaves as such numbers too.
#include <cstring>

#include "encoded/f8.h"
#include "encoded/few_product.h"

namespace lgk {
namespace {

// A few queries in groups, each with its units, and every unit with its scale.
struct FewF8 {
  Plan plan;
  int parts;      // of a query's number
  int64_t width;  // queries of a group
  Buffer<uint16_t> numbers;
  Buffer<float> scales;
  const F8Kernels& kernels = *f8_kernels();

  FewF8(const Plan& plan, int parts)
      : plan(plan),
        parts(parts),
        width(ceil_div(plan.queries, ceil_div(plan.queries, kFewQueries))),
        numbers(groups() * plan.units() * width * parts * kUnit),
        scales(groups() * width * plan.units()) {
    if (plan.queries % width == 0) return;
    std::memset(numbers_of(groups() - 1, 0), 0, plan.units() * width * parts * kUnit * sizeof(uint16_t));
    std::memset(scales_of(groups() * width - 1), 0, plan.units() * sizeof(float));
  }

  int64_t groups() const { return ceil_div(plan.queries, width); }
  int64_t unit_bytes() const { return groups() * width * parts * kUnit * sizeof(uint16_t); }
  uint16_t* numbers_of(int64_t group, int64_t unit) const {
    return numbers.data() + (group * plan.units() + unit) * width * parts * kUnit;
  }
  float* scales_of(int64_t query) const { return scales.data() + query * plan.units(); }

  void few(int64_t group, int64_t unit, const uint8_t* const* rows, const uint8_t* const* last, int64_t units,
           const float* const* row_scales, float* sums, bool add) const {
    kernels.few(rows, last, units, row_scales, numbers_of(group, unit), parts, scales_of(group * width) + unit,
                plan.units(), width, sums, add);
  }

  // False if the span holds NaN or Inf.
  bool pack(const Rows& b, int64_t query, int64_t s, float* x) const {
    const float* from = span_numbers(plan, b, query, s, x);
    const int64_t units = plan.units_of(s), first = s * plan.span_units();
    const F8Scale scale(integer_kernels()->largest(from, units * kUnit), plan.digits == 1);
    if (!scale.finite) return false;
    for (int64_t u = 0; u < units; ++u) {
      kernels.part(from + u * kUnit, scale.inverse, plan.digits == 1, parts,
                   numbers_of(query / width, first + u) + query % width * parts * kUnit);
      scales_of(query)[first + u] = scale.of_one;
    }
    return true;
  }
};

struct FewF8Queries : IntegerQueries {
  FewF8 columns;

  FewF8Queries(const Plan& plan, int parts) : columns(plan, parts) {}
  void multiply(const EncodedRows& a, int64_t m, Output<float> c, int n_threads) const override {
    multiply_few_queries(columns, a, m, c, n_threads);
  }
};

}  // namespace

std::unique_ptr<IntegerQueries> pack_few_f8(const Plan& plan, const Rows& b, int n_threads) {
  const bool rests = plan.digits > 1 && b.number() != Dtype::kBF16;
  auto queries = std::make_unique<FewF8Queries>(plan, rests ? 2 : 1);
  const FewF8& columns = queries->columns;
  const auto pack = [&](int64_t query, int64_t s, float* x) { return columns.pack(b, query, s, x); };
  if (!pack_spans(plan, pack, n_threads)) return nullptr;
  return queries;
}

}  // namespace lgk
