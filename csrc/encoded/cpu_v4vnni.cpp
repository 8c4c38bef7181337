// AVX512-VNNI beside x86-64-v4: four products of an unsigned and a signed byte added to each 32-bit lane.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "encoded/integers.h"

#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni")

#define LGK_INLINE static inline __attribute__((always_inline))

namespace lgk {
namespace {

constexpr int64_t kAheadBytes = 2048;

constexpr int64_t unit_bytes(Code code) {
  return code == Code::kI8 ? kUnit : code == Code::kI4 ? kUnit / 2 : code == Code::kI2 ? kUnit / 4 : kUnit / 8;
}

// GCC 12 warns of its own undefined operands in the unmasked intrinsics.
LGK_INLINE __m512 as_floats(__m512i x) { return _mm512_maskz_cvtepi32_ps(0xffff, x); }

// sum + four products in each lane. GCC 12 copies the operands of the intrinsic to and fro.
LGK_INLINE void add_products(__m512i& sum, __m512i codes, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

struct Unit {
  __m512i low, high;
};

template <Code kCode>
LGK_INLINE Unit load_unit(const uint8_t* p) {
  if constexpr (kCode == Code::kI8) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    return {_mm512_xor_si512(_mm512_loadu_si512(p), flip), _mm512_xor_si512(_mm512_loadu_si512(p + 64), flip)};
  } else if constexpr (kCode == Code::kI4) {
    const __m512i all = _mm512_loadu_si512(p), low = _mm512_set1_epi8(15);
    return {_mm512_and_si512(all, low), _mm512_and_si512(_mm512_srli_epi16(all, 4), low)};
  } else if constexpr (kCode == Code::kI2) {
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i all = _mm512_maskz_broadcast_i64x4(0xff, here), low = _mm512_set1_epi8(3);
    const __m512i first = _mm512_mask_srli_epi32(all, 0xff00, all, 2);  // the upper half by one more field
    return {_mm512_and_si512(first, low), _mm512_and_si512(_mm512_srli_epi16(first, 4), low)};
  } else {
    uint64_t bits[2];
    std::memcpy(bits, p, sizeof(bits));
    const __m512i two = _mm512_set1_epi8(2);
    return {_mm512_maskz_mov_epi8(bits[0], two), _mm512_maskz_mov_epi8(bits[1], two)};
  }
}

template <Code kCode>
void expand_units(const uint8_t* codes, int64_t units, uint8_t* out) {
  for (int64_t u = 0; u < units; ++u) {
    const Unit unit = load_unit<kCode>(codes + u * unit_bytes(kCode));
    _mm512_storeu_si512(out + u * kUnit, unit.low);
    _mm512_storeu_si512(out + u * kUnit + 64, unit.high);
  }
}

void expand(Code code, const uint8_t* codes, int64_t units, uint8_t* out) {
  if (code == Code::kI8) return expand_units<Code::kI8>(codes, units, out);
  if (code == Code::kI4) return expand_units<Code::kI4>(codes, units, out);
  if (code == Code::kI2) return expand_units<Code::kI2>(codes, units, out);
  expand_units<Code::kSign>(codes, units, out);
}

float largest(const float* x, int64_t n) {
  const __m512i size = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();  // magnitudes in the order of their bits, NaN above all
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 kept = static_cast<__mmask16>(n - i < 16 ? (1 << (n - i)) - 1 : 0xffff);
    most = _mm512_maskz_max_epi32(0xffff, most, _mm512_and_si512(_mm512_maskz_loadu_epi32(kept, x + i), size));
  }
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, most);
  int32_t found = 0;
  for (int i = 0; i < 16; ++i) found = lanes[i] > found ? lanes[i] : found;
  float largest;
  std::memcpy(&largest, &found, sizeof(largest));
  return largest;
}

template <int kEach>
void whole_numbers(const float* x, float inverse, int32_t* whole) {
  alignas(64) int32_t found[kUnit];
  const __m512 factor = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < kUnit; i += 16) {
    const __m512i nearest = _mm512_maskz_cvt_roundps_epi32(0xffff, _mm512_mul_ps(_mm512_loadu_ps(x + i), factor),
                                                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm512_store_si512((kEach == 1 ? whole : found) + i, nearest);
  }
  for (int64_t part = 0; kEach > 1 && part < kEach; ++part) {
    for (int64_t i = 0; i < kUnit / kEach; ++i) whole[part * (kUnit / kEach) + i] = found[i * kEach + part];
  }
}

void to_digits(Code code, const float* x, float inverse, int digits, int8_t* out, int32_t* sums) {
  alignas(64) int32_t whole[kUnit];
  if (code == Code::kI4) {
    whole_numbers<2>(x, inverse, whole);
  } else if (code == Code::kI2) {
    whole_numbers<4>(x, inverse, whole);
  } else {
    whole_numbers<1>(x, inverse, whole);
  }
  for (int digit = 0; digit < digits; ++digit) {
    int8_t* to = out + digit * kUnit;
    for (int64_t i = 0; i < kUnit; i += 16) {
      const __m512i number = _mm512_load_si512(whole + i);
      const __m512i low = _mm512_maskz_srai_epi32(0xffff, _mm512_maskz_slli_epi32(0xffff, number, 24), 24);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_maskz_cvtepi32_epi8(0xffff, low));
      _mm512_store_si512(whole + i, _mm512_maskz_srai_epi32(0xffff, _mm512_sub_epi32(number, low), 8));
    }
    __m512i sum = _mm512_setzero_si512();
    add_products(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(to));
    add_products(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(to + 64));
    alignas(64) int32_t lanes[16];
    _mm512_store_si512(lanes, sum);
    sums[digit] = 0;
    for (int i = 0; i < 16; ++i) sums[digit] += lanes[i];
  }
}

void widen(const uint16_t* halves, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 kept = static_cast<__mmask16>(n - i < 16 ? (1 << (n - i)) - 1 : 0xffff);
    _mm512_mask_storeu_ps(out + i, kept, _mm512_maskz_cvtph_ps(kept, _mm256_maskz_loadu_epi16(kept, halves + i)));
  }
}

// sums [2] = the whole sums of both digits, or of two vectors of queries with one.
template <int kDigits>
LGK_INLINE void add_scaled(const __m512i (&sum)[2], __m512 scale, const __m512 (&b_scale)[2], float* to) {
  if constexpr (kDigits == 1) {
    for (int v = 0; v < 2; ++v) {
      const __m512 product = _mm512_mul_ps(as_floats(sum[v]), b_scale[v]);
      _mm512_storeu_ps(to + 16 * v, _mm512_fmadd_ps(product, scale, _mm512_loadu_ps(to + 16 * v)));
    }
  } else {
    const __m512 whole = _mm512_fmadd_ps(as_floats(sum[1]), _mm512_set1_ps(256.0f), as_floats(sum[0]));
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_mul_ps(whole, b_scale[0]), scale, _mm512_loadu_ps(to)));
  }
}

template <int kDigits>
void tile_digits(const uint8_t* a, int64_t lda, const int8_t* b, int64_t units, const int32_t* start,
                 const float* a_scale, const float* b_scale, float* c, int64_t ldc) {
  __m512i sum[kTileCodes][2];
#pragma GCC unroll 16
  for (int i = 0; i < kTileCodes; ++i) {
    sum[i][0] = _mm512_loadu_si512(start);
    sum[i][1] = _mm512_loadu_si512(start + 16);
  }
  const uint8_t* third[4] = {a, a + 3 * lda, a + 6 * lda, a + 9 * lda};
  for (int64_t k = 0; k < units * (kUnit / 4); ++k) {
    const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 64);
#pragma GCC unroll 16
    for (int i = 0; i < kTileCodes; ++i) {
      int32_t four;
      __builtin_memcpy(&four, third[i / 3] + i % 3 * lda, sizeof(four));
      const __m512i codes = _mm512_set1_epi32(four);
      add_products(sum[i][0], codes, left);
      add_products(sum[i][1], codes, right);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) third[i] += 4;
    b += 4 * kTileColumns;
  }
  const __m512 scales[2] = {_mm512_loadu_ps(b_scale), kDigits == 1 ? _mm512_loadu_ps(b_scale + 16) : __m512{}};
#pragma GCC unroll 16
  for (int i = 0; i < kTileCodes; ++i) add_scaled<kDigits>(sum[i], _mm512_set1_ps(a_scale[i]), scales, c + i * ldc);
}

void tile(const uint8_t* a, int64_t lda, const int8_t* b, int digits, int64_t units, const int32_t* start,
          const float* a_scale, const float* b_scale, float* c, int64_t ldc) {
  const auto run = digits == 1 ? tile_digits<1> : tile_digits<2>;
  run(a, lda, b, units, start, a_scale, b_scale, c, ldc);
}

// A lane's eight products of a unit fit 32 bits with both digits.
template <Code kCode, int kDigits, int kQueries>
LGK_INLINE void few_unit(const uint8_t* from, const int8_t* b, const float* scale, __m512 (&total)[kQueries]) {
  const Unit unit = load_unit<kCode>(from);
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int digit = kDigits - 1; digit >= 0; --digit) {
      const int8_t* digits = b + (q * kDigits + digit) * kUnit;
      add_products(sum, unit.low, _mm512_loadu_si512(digits));
      add_products(sum, unit.high, _mm512_loadu_si512(digits + 64));
      if (digit > 0) sum = _mm512_maskz_slli_epi32(0xffff, sum, 8);
    }
    total[q] = _mm512_fmadd_ps(as_floats(sum), _mm512_set1_ps(scale[q * kFewUnits]), total[q]);
  }
}

template <Code kCode, int kDigits, int kQueries>
void few_queries(const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* a_scale,
                 const int8_t* b, const float* b_scale, const float* b_sum, int64_t ldb, float* sums, bool add) {
  constexpr int kRows = kFewRows;
  constexpr int64_t kBytes = unit_bytes(kCode), kLineUnits = kBytes < 64 ? 64 / kBytes : 1;
  alignas(64) float scales[kRows][kQueries][kFewUnits];
  __m512 total[kRows][kQueries];
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < kQueries; ++q) {
      __m512 sum = add ? _mm512_loadu_ps(sums + (i * kQueries + q) * kFewLanes) : _mm512_setzero_ps();
      for (int64_t u = 0; u < units; u += kFewLanes) {
        const __m512 scale = _mm512_loadu_ps(a_scale + i * kFewUnits + u);
        sum = _mm512_fnmadd_ps(scale, _mm512_loadu_ps(b_sum + q * ldb + u), sum);
        _mm512_store_ps(scales[i][q] + u, _mm512_mul_ps(scale, _mm512_loadu_ps(b_scale + q * ldb + u)));
      }
      total[i][q] = sum;
    }
  }
  const int64_t whole = last == nullptr ? units : units - 1;
  for (int64_t u = 0; u < whole;) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      for (int64_t line = 0; line < kBytes; line += 64) {
        __builtin_prefetch(rows[i] + u * kBytes + kAheadBytes + line, 0, 2);
      }
    }
    const int64_t end = u + kLineUnits < whole ? u + kLineUnits : whole;
    for (; u < end; ++u, b += kQueries * kDigits * kUnit) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        few_unit<kCode, kDigits, kQueries>(rows[i] + u * kBytes, b, scales[i][0] + u, total[i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (whole < units) few_unit<kCode, kDigits, kQueries>(last[i], b, scales[i][0] + whole, total[i]);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) _mm512_storeu_ps(sums + (i * kQueries + q) * kFewLanes, total[i][q]);
  }
}

template <Code kCode, int kDigits>
void few_digits(const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* a_scale,
                const int8_t* b, const float* b_scale, const float* b_sum, int64_t ldb, int64_t queries, float* sums,
                bool add) {
  const auto run = queries == 1   ? few_queries<kCode, kDigits, 1>
                   : queries == 2 ? few_queries<kCode, kDigits, 2>
                   : queries == 3 ? few_queries<kCode, kDigits, 3>
                                  : few_queries<kCode, kDigits, 4>;
  run(rows, last, units, a_scale, b, b_scale, b_sum, ldb, sums, add);
}

template <Code kCode>
void few_code(const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* a_scale,
              const int8_t* b, int digits, const float* b_scale, const float* b_sum, int64_t ldb, int64_t queries,
              float* sums, bool add) {
  const auto run = digits == 1 ? few_digits<kCode, 1> : few_digits<kCode, 2>;
  run(rows, last, units, a_scale, b, b_scale, b_sum, ldb, queries, sums, add);
}

void few(Code code, const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* a_scale,
         const int8_t* b, int digits, const float* b_scale, const float* b_sum, int64_t ldb, int64_t queries,
         float* sums, bool add) {
  const auto run = code == Code::kI8   ? few_code<Code::kI8>
                   : code == Code::kI4 ? few_code<Code::kI4>
                   : code == Code::kI2 ? few_code<Code::kI2>
                                       : few_code<Code::kSign>;
  run(rows, last, units, a_scale, b, digits, b_scale, b_sum, ldb, queries, sums, add);
}

}  // namespace

extern const IntegerKernels kIntegersV4Vnni;
const IntegerKernels kIntegersV4Vnni = {expand, largest, to_digits, widen, tile, few};

}  // namespace lgk
#endif
