// AVX512-BF16 beside x86-64-v4: products of two operands of bf16.
//
// A packed number is a pair of neighbours, and a step adds both products of a pair to an fp32 sum. The instruction
// rounds to nearest even, takes subnormal operands for 0 and flushes subnormal products and sums to 0.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "common/kernels.h"

#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")

#define LGK_VECTOR_BYTES 64
#define LGK_ROWS 12
#define LGK_ROW_STEP 2
#define LGK_VECTORS 4
#define LGK_SUMS 24
#define LGK_DOT_SUMS 16
#define LGK_F16C
#include "common/dot.inc"
#include "common/outer.inc"
#include "common/pack.inc"

namespace lgk {
namespace {

struct PairProducts {
  template <typename T>
  static LGK_METHOD Vec<T> apply(Vec<T> sum, T a, Vec<T> b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)_mm512_set1_ps(a));
  }
  // GCC would broadcast a first, which takes a third of the multiplication's time.
  template <typename T>
  static LGK_METHOD Vec<T> apply_at(Vec<T> sum, const void* a, Vec<T> b) {
    typedef T Number __attribute__((may_alias));
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*static_cast<const Number*>(a)));
    return sum;
  }
};

struct PairDot {
  static constexpr int kTerms = 2;
  template <typename T>
  static LGK_METHOD Vec<T> row(const BFloat16* p) {
    return load(reinterpret_cast<const T*>(p));
  }
  template <typename T>
  static LGK_METHOD Vec<T> add(Vec<T> sum, Vec<T> row, Vec<T> column) {
    return _mm512_dpbf16_ps(sum, (__m512bh)column, (__m512bh)row);
  }
};

// The same as `widen`, but for subnormal numbers, which become 0 in either product.
LGK_INLINE void widen_run(const RoundedFloat* src, int64_t n, Half* dst) {
  int64_t i = 0;
  for (; i + 2 * kLanes<float> <= n; i += 2 * kLanes<float>) {
    const __m512 low = _mm512_loadu_ps(src + i), high = _mm512_loadu_ps(src + i + kLanes<float>);
    _mm512_storeu_si512(dst + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  for (; i < n; i += kLanes<float>) {
    const __mmask16 kept = n - i < kLanes<float> ? (1u << (n - i)) - 1 : 0xffff;
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(kept, src + i));
    _mm256_mask_storeu_epi16(dst + i, kept, (__m256i)rounded);
  }
}

void pack_pairs(const Rows& src, int64_t row, int64_t rows, int64_t column, int64_t columns, float* dst, int64_t ld) {
  Half* pairs = reinterpret_cast<Half*>(dst);
  if (src.rounded) {
    copy_either<RoundedFloat, 2>(src, row, rows, column, columns, pairs, 2 * ld);
  } else {
    copy_either<Half, 2>(src, row, rows, column, columns, pairs, 2 * ld);
  }
  const int64_t padded = round_to(columns, 2 * kLanes<float>);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = columns; c < padded; ++c) pairs[r * 2 * ld + c] = Half{0};
  }
  for (int64_t r = rows; r < round_to(rows, LGK_ROW_STEP); ++r) zero(dst + r * ld, padded / 2);
}

// 16 numbers of two rows each as pairs.
LGK_INLINE __m512i paired(const Half* low, __mmask16 low_kept, const Half* high, __mmask16 high_kept) {
  const __m512i lower = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(low_kept, low));
  const __m512i upper = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(high_kept, high));
  return _mm512_or_si512(lower, _mm512_maskz_slli_epi32(0xffff, upper, 16));
}
LGK_INLINE __m512i paired(const RoundedFloat* low, __mmask16 low_kept, const RoundedFloat* high, __mmask16 high_kept) {
  const __m512bh both =
      _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high_kept, high), _mm512_maskz_loadu_ps(low_kept, low));
  const __m512i order =
      _mm512_or_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                      _mm512_set_epi32(31 << 16, 30 << 16, 29 << 16, 28 << 16, 27 << 16, 26 << 16, 25 << 16, 24 << 16,
                                       23 << 16, 22 << 16, 21 << 16, 20 << 16, 19 << 16, 18 << 16, 17 << 16, 16 << 16));
  return _mm512_maskz_permutexvar_epi16(0xffffffff, order, (__m512i)both);
}

// Rows row and row + 1 of src, or the first alone.
template <typename S>
void pair_rows(const Rows& src, int64_t row, bool two, int64_t column, int64_t columns, float* dst) {
  const S* data = static_cast<const S*>(src.data) + column * src.column_stride;
  const S* first = data + src.offset(row);
  const S* second = two ? data + src.offset(row + 1) : first;
  for (int64_t c = 0; c < columns; c += kLanes<float>) {
    const int64_t count = columns - c < kLanes<float> ? columns - c : kLanes<float>;
    const __mmask16 kept = count < kLanes<float> ? (1u << count) - 1 : 0xffff;
    S row_of_first[kLanes<float>], row_of_second[kLanes<float>];
    const S *low = first + c, *high = second + c;
    if (src.column_stride != 1) {
      for (int64_t i = 0; i < count; ++i) {
        row_of_first[i] = first[(c + i) * src.column_stride];
        row_of_second[i] = second[(c + i) * src.column_stride];
      }
      low = row_of_first, high = row_of_second;
    }
    _mm512_storeu_si512(dst + c, paired(low, kept, high, two ? kept : 0));
  }
}

void pack_row_pairs(const Rows& src, int64_t row, int64_t rows, int64_t column, int64_t columns, float* dst,
                    int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2) {
    if (src.rounded) {
      pair_rows<RoundedFloat>(src, row + r, r + 1 < rows, column, columns, dst + r / 2 * ld);
    } else {
      pair_rows<Half>(src, row + r, r + 1 < rows, column, columns, dst + r / 2 * ld);
    }
  }
}

}  // namespace

extern const Products<float> kPairsV4Bf16;
const Products<float> kPairsV4Bf16 = {Dtype::kBF16,
                                      kLanes<float>,
                                      LGK_ROW_STEP,
                                      LGK_ROW_STEP,
                                      LGK_ROWS,
                                      2,
                                      kFew,
                                      kFewTerms,
                                      pack_pairs,
                                      pack_columns<float, pack_pairs, 2>,
                                      multiply<PairProducts, float>,
                                      nullptr,
                                      pack_row_pairs,
                                      outer<PairProducts, float>,
                                      dot_dtype<PairDot, float, BFloat16>};

}  // namespace lgk
#endif
