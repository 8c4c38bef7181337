#include <omp.h>

#include <algorithm>
#include <limits>

#include "common/kernels.h"
#include "common/threads.h"
#include "encoded/f8.h"
#include "encoded/integer_product.h"
#include "encoded/kernels.h"
#include "encoded/product.h"
#include "encoded/queries.h"

namespace lgk {
namespace {

constexpr double kPacking = 8;  // multiply-adds that take as long as a number's digits
constexpr double kLargest[kMostDigits + 1] = {0, 127, 127 * 256};  // whole numbers; their digits stay within a byte

// The numbers that int8 queries stand for: out[j][k] = scale * code for each span of a query, as quantize_rows has it.
void round_to_int8(const Rows& b, int64_t n, int64_t depth, int64_t span, float* out, int n_threads) {
  const EncodedKernels& kernels = encoded_kernels();
  const Encoding encoding = {Code::kI8, false, span};
  n_threads = threads_for(double(n) * depth, n_threads);
  const int64_t size = (lgk::kernels<float>().row_tile + 1) * kMostSpan;
  const Buffer<float> scratch(size * n_threads);
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t j = 0; j < n; ++j) {
    float* x = scratch.data() + size * omp_get_thread_num();
    uint8_t codes[kMostSpan];
    for (int64_t start = 0; start < depth; start += span) {
      const int64_t here = std::min(span, depth - start);
      lgk::kernels<float>().pack_rows(b, j, 1, start, here, x, kMostSpan);
      float scale = kernels.scale_of(x, here, encoding, false, nullptr);
      if (scale < std::numeric_limits<float>::min()) scale = 0;
      if (scale > std::numeric_limits<float>::max()) scale = std::numeric_limits<float>::quiet_NaN();
      kernels.encode(x, here, scale > 0 ? 1.0f / scale : 0.0f, encoding, {false, 0}, 0, codes);
      kernels.decode({encoding, codes, &scale, 0, 0}, 0, 0, here, out + j * depth + start);
    }
  }
}

// Queries that rows meet while they are expanded; a power of 2 up to kAtOnce.
int64_t queries_at_once(Code code) {
  if (code == Code::kF8) return f8_kernels() != nullptr ? f8_kernels()->shape.queries : EncodedQueries::kAtOnce;
  return integer_kernels() != nullptr ? integer_kernels()->many.shape.queries : EncodedQueries::kAtOnce;
}

}  // namespace

EncodedQueries::EncodedQueries(const Rows& b, int64_t n, int64_t depth, const Encoding& encoding, int digits,
                               int n_threads)
    : b_(b), depth_(depth), at_once_(queries_at_once(encoding.code)), groups_(ceil_div(n, at_once_)) {
  if (digits == 0 || n == 0 || depth == 0) return;
  const int64_t span = std::min(encoding.block, kMostSpan);
  const bool f8 = encoding.code == Code::kF8;
  const bool parts = encoding.block >= kUnit && (f8 ? f8_kernels() != nullptr : integer_kernels() != nullptr);
  for (int64_t g = 0; parts && g < static_cast<int64_t>(groups_.size()); ++g) {
    const int kept = f8 ? digits : std::max(digits, integer_kernels()->fewest_digits);
    const Plan plan = {encoding.code, depth, std::min(at_once_, n - g * at_once_), kept, span, kLargest[digits]};
    const int threads = threads_for(kPacking * plan.queries * depth, n_threads);
    const bool few = plan.queries <= kFewColumns;
    const auto pack = f8 && few          ? pack_few_f8
                      : f8               ? pack_many_f8
                      : !few             ? pack_many_integers
                      : tables_pay(plan) ? pack_few_signs
                                         : pack_few_integers;
    groups_[g] = pack(plan, b.from(g * at_once_), threads);
  }
  const auto laid_out = [](const auto& group) { return group != nullptr; };
  if (digits != 1 || std::all_of(groups_.begin(), groups_.end(), laid_out)) return;
  rounded_ = std::make_unique<Buffer<float>>(n * depth);
  round_to_int8(b, n, depth, span, rounded_->data(), n_threads);
  b_ = matrix(rounded_->data(), Dtype::kF32, depth, 1);
}

EncodedQueries::~EncodedQueries() = default;

void EncodedQueries::multiply(const EncodedRows& a, int64_t m, int64_t first, int64_t n, Output<float> c,
                              int n_threads) const {
  if (m == 0 || n == 0) return;
  if (depth_ == 0) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) c.data[i * c.row_stride + j * c.column_stride] = 0;
    }
    return;
  }
  for (int64_t j = 0; j < n;) {
    int64_t here = std::min(at_once_, n - j);
    const IntegerQueries* group = groups_[(first + j) / at_once_].get();
    const Output<float> to = {c.data + j * c.column_stride, c.row_stride, c.column_stride};
    if (group != nullptr) {
      group->multiply(a, m, to, threads_for(double(m) * here * depth_, n_threads));
    } else {
      while (j + here < n && groups_[(first + j + here) / at_once_] == nullptr) {
        here += std::min(at_once_, n - j - here);
      }
      multiply_decoded(a, m, b_.from(first + j), here, depth_, to, n_threads);
    }
    j += here;
  }
}

void multiply_encoded(const EncodedRows& a, int64_t m, const Rows& b, int64_t n, int64_t depth, Output<float> c,
                      int digits, int n_threads) {
  EncodedQueries(b, n, depth, a.encoding, digits, n_threads).multiply(a, m, 0, n, c, n_threads);
}

}  // namespace lgk
