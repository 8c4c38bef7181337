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

#include "encoded/units.inc"

namespace lgk {
namespace {

constexpr int64_t kRows = 12;  // of a tile

// GCC 12 warns of its own undefined operands in the unmasked intrinsics.
LGK_INLINE __m512 as_floats(__m512i x) { return _mm512_maskz_cvtepi32_ps(0xffff, x); }

// sum + four products in each lane. GCC 12 copies the operands of the intrinsic to and fro.
LGK_INLINE void add_products(__m512i& sum, __m512i codes, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

template <bool kLargest>
LGK_INLINE __m512i join(__m512i a, __m512i b) {
  return kLargest ? _mm512_maskz_max_epi32(0xffff, a, b) : _mm512_add_epi32(a, b);
}

// The largest of all lanes, or their sum.
template <bool kLargest>
LGK_INLINE int32_t join_lanes(__m512i x) {
  x = join<kLargest>(x, _mm512_maskz_shuffle_i64x2(0xff, x, x, 0x4e));
  x = join<kLargest>(x, _mm512_maskz_shuffle_i64x2(0xff, x, x, 0xb1));
  x = join<kLargest>(x, _mm512_maskz_shuffle_epi32(0xffff, x, _MM_PERM_BADC));
  x = join<kLargest>(x, _mm512_maskz_shuffle_epi32(0xffff, x, _MM_PERM_CDAB));
  return _mm_cvtsi128_si32(_mm512_maskz_extracti32x4_epi32(0xf, x, 0));
}

float largest(const float* x, int64_t n) {
  const __m512i size = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();  // magnitudes in the order of their bits, NaN above all
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 kept = static_cast<__mmask16>(n - i < 16 ? (1 << (n - i)) - 1 : 0xffff);
    most = _mm512_maskz_max_epi32(0xffff, most, _mm512_and_si512(_mm512_maskz_loadu_epi32(kept, x + i), size));
  }
  const int32_t found = join_lanes<true>(most);
  float largest;
  std::memcpy(&largest, &found, sizeof(largest));
  return largest;
}

// Half of the bytes of kUnit numbers in the expanded order: part by part every kEach'th.
template <int kEach>
LGK_INLINE void store_parts(__m512i all, int8_t* out) {
  constexpr int64_t kPart = kUnit / kEach;
  for (int part = 0; part < kEach; ++part) {
    int8_t* to = out + part * kPart;
    if constexpr (kEach == 1) {
      _mm512_storeu_si512(to, all);
    } else if constexpr (kEach == 2) {
      const __m512i field = _mm512_maskz_srli_epi16(~uint32_t{0}, all, 8 * part);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi16_epi8(~uint32_t{0}, field));
    } else if constexpr (kEach == 4) {
      const __m512i field = _mm512_maskz_srli_epi32(0xffff, all, 8 * part);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, field));
    } else {
      const __m512i field = _mm512_maskz_srli_epi64(0xff, all, 8 * part);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi64_epi8(0xff, field));
    }
  }
}

// The low bytes of whole[0], then those of whole[1] and so on.
LGK_INLINE __m512i low_bytes(const __m512i (&whole)[4]) {
  __m512i all = _mm512_zextsi128_si512(_mm512_maskz_cvtepi32_epi8(0xffff, whole[0]));
  all = _mm512_maskz_inserti32x4(0xffff, all, _mm512_maskz_cvtepi32_epi8(0xffff, whole[1]), 1);
  all = _mm512_maskz_inserti32x4(0xffff, all, _mm512_maskz_cvtepi32_epi8(0xffff, whole[2]), 2);
  return _mm512_maskz_inserti32x4(0xffff, all, _mm512_maskz_cvtepi32_epi8(0xffff, whole[3]), 3);
}

template <int kEach, int kDigits>
void to_digits_of(const float* x, float inverse, int8_t* out, int32_t* sums) {
  const __m512 factor = _mm512_set1_ps(inverse);
  __m512i sum[kDigits] = {};
  for (int64_t half = 0; half < 2; ++half) {
    __m512i whole[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      whole[v] = _mm512_maskz_cvt_roundps_epi32(0xffff, _mm512_mul_ps(_mm512_loadu_ps(x + 64 * half + 16 * v), factor),
                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
#pragma GCC unroll 2
    for (int digit = 0; digit < kDigits; ++digit) {
      const __m512i all = low_bytes(whole);
      store_parts<kEach>(all, out + digit * kUnit + half * (64 / kEach));
      add_products(sum[digit], _mm512_set1_epi8(1), all);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        whole[v] = _mm512_maskz_srai_epi32(0xffff, _mm512_add_epi32(whole[v], _mm512_set1_epi32(128)), 8);
      }
    }
  }
#pragma GCC unroll 2
  for (int digit = 0; digit < kDigits; ++digit) sums[digit] = join_lanes<false>(sum[digit]);
}

template <int kEach>
void to_digits_each(const float* x, float inverse, int digits, int8_t* out, int32_t* sums) {
  (digits == 1 ? to_digits_of<kEach, 1> : to_digits_of<kEach, 2>)(x, inverse, out, sums);
}

void to_digits(Code code, const float* x, float inverse, int digits, int8_t* out, int32_t* sums) {
  const auto run = code == Code::kI8   ? to_digits_each<1>
                   : code == Code::kI4 ? to_digits_each<2>
                   : code == Code::kI2 ? to_digits_each<4>
                                       : to_digits_each<8>;
  run(x, inverse, digits, out, sums);
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
  __m512i sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = _mm512_loadu_si512(start);
    sum[i][1] = _mm512_loadu_si512(start + 16);
  }
  const uint8_t* third[4] = {a, a + 3 * lda, a + 6 * lda, a + 9 * lda};
  for (int64_t k = 0; k < units * (kUnit / 4); ++k) {
    const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 64);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
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
  for (int i = 0; i < kRows; ++i) add_scaled<kDigits>(sum[i], _mm512_set1_ps(a_scale[i]), scales, c + i * ldc);
}

void tile(const uint8_t* a, int64_t lda, const int8_t* b, int digits, int64_t units, const int32_t* start,
          const float* a_scale, const float* b_scale, float* c, int64_t ldc, Pending&) {
  const auto run = digits == 1 ? tile_digits<1> : tile_digits<2>;
  run(a, lda, b, units, start, a_scale, b_scale, c, ldc);
}

void finish(int, int64_t, Pending&) {}

}  // namespace
}  // namespace lgk

#include "encoded/few_integers.inc"

namespace lgk {

extern const IntegerKernels kIntegersV4Vnni;
const IntegerKernels kIntegersV4Vnni = {
    {{kRows, 16, 64, kUnit}, expand<false>, tile, finish}, 1, largest, to_digits, widen, few, sum_lanes};

}  // namespace lgk
#endif
