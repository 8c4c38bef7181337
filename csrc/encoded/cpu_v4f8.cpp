// AVX512-BF16, VNNI and VBMI beside x86-64-v4: fp8 rows and many queries.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "encoded/f8.h"

#pragma GCC target( \
    "avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi")

#define LGK_INLINE static inline __attribute__((always_inline))

namespace lgk {
namespace {

constexpr int kVectors = kTileColumns / 16;
constexpr int kRows = 6;  // whose sums are in the registers
constexpr int64_t kTileRows = 2 * kRows;
constexpr __mmask64 kAllBytes = ~uint64_t{0};
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

struct alignas(64) Tables {
  uint8_t high[128], low[128];  // of the bf16 that a magnitude is
  uint8_t byte[128];            // of the number rounded
};

constexpr float magnitude(int size) {
  if (size < 8) return static_cast<float>(size) * 0x1p-9f;
  return static_cast<float>((size & 7) + 8) * (static_cast<float>(1 << (size >> 3)) * 0x1p-10f);
}

constexpr Tables make_tables() {
  Tables tables = {};
  for (int size = 0; size < 128; ++size) {
    tables.high[size] = static_cast<uint8_t>(bf16_of_f8(size) >> 8);
    tables.low[size] = static_cast<uint8_t>(bf16_of_f8(size) & 0xff);
    const int rounded = static_cast<int>(magnitude(size) * 127.0f / kMostF8 + 0.5f);
    tables.byte[size] = static_cast<uint8_t>(128 + (rounded < 127 ? rounded : 127));
  }
  return tables;
}

constexpr Tables kTables = make_tables();

LGK_INLINE __m512i look_up(const uint8_t (&table)[128], __m512i code) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
}

// 64 codes as bf16, in f8_pair's order.
LGK_INLINE void to_pairs(__m512i code, __m512i& first, __m512i& second) {
  constexpr int kFirstOrBoth = 0xf8;  // a | (b & c)
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80)), low = look_up(kTables.low, code);
  const __m512i high = _mm512_ternarylogic_epi32(look_up(kTables.high, code), code, sign, kFirstOrBoth);
  first = _mm512_maskz_unpacklo_epi8(kAllBytes, low, high);
  second = _mm512_maskz_unpackhi_epi8(kAllBytes, low, high);
}

void expand(const uint8_t* codes, int64_t units, uint8_t* out) {
  for (int64_t half = 0; half < 2 * units; ++half) {
    uint8_t* unit = out + half / 2 * kF8Unit;
    const __m512i code = _mm512_loadu_si512(codes + 64 * half);
    __m512i first, second;
    to_pairs(code, first, second);
    _mm512_storeu_si512(unit + half % 2 * 128, first);
    _mm512_storeu_si512(unit + half % 2 * 128 + 64, second);
    const __m512i byte = look_up(kTables.byte, code);
    const __m512i signed_byte = _mm512_mask_sub_epi8(byte, _mm512_movepi8_mask(code), _mm512_setzero_si512(), byte);
    _mm512_storeu_si512(unit + 2 * kUnit + half % 2 * 64, signed_byte);
  }
}

// 16 numbers times `inverse` as bf16 and what is missing.
LGK_INLINE __m256i leading_of(const float* x, float inverse, bool whole, __m512& rest) {
  __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse));
  if (whole) scaled = _mm512_maskz_roundscale_ps(0xffff, scaled, kNearest);
  const __m256i leading = (__m256i)_mm512_cvtneps_pbh(scaled);
  const __m512i wide = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, leading), 16);
  rest = _mm512_sub_ps(scaled, _mm512_castsi512_ps(wide));
  return leading;
}

int32_t split(const float* x, float inverse, bool whole, uint16_t* numbers, int8_t* rests) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < kUnit; i += 16) {
    __m512 rest;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers + i), leading_of(x + i, inverse, whole, rest));
    const __m512 scaled = _mm512_mul_ps(rest, _mm512_set1_ps(kRestUnits));
    const __m512i units = _mm512_maskz_cvt_roundps_epi32(0xffff, scaled, kNearest);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rests + i), _mm512_maskz_cvtsepi32_epi8(0xffff, units));
    sum = _mm512_add_epi32(sum, units);
  }
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, sum);
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += lanes[i];
  return total;
}

// 64 numbers to f8_pair's order.
LGK_INLINE void store_in_order(const uint16_t* numbers, uint16_t* out) {
  const __m512i low = _mm512_loadu_si512(numbers), high = _mm512_loadu_si512(numbers + 32);
  _mm512_storeu_si512(out, _mm512_maskz_shuffle_i64x2(0xff, low, high, 0x88));
  _mm512_storeu_si512(out + 32, _mm512_maskz_shuffle_i64x2(0xff, low, high, 0xdd));
}

void part(const float* x, float inverse, bool whole, int parts, uint16_t* out) {
  for (int64_t i = 0; i < kUnit; i += 64) {
    uint16_t numbers[64], rests[64];
    for (int64_t k = 0; k < 64; k += 16) {
      __m512 rest;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers + k), leading_of(x + i + k, inverse, whole, rest));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rests + k), (__m256i)_mm512_cvtneps_pbh(rest));
    }
    store_in_order(numbers, out + i);
    if (parts > 1) store_in_order(rests, out + kUnit + i);
  }
}

// GCC 12 copies the operands of the intrinsics to and fro.
LGK_INLINE void add_pairs(__m512& sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
LGK_INLINE void add_bytes(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

LGK_INLINE __m512i spread(const uint8_t* four) {
  int32_t word;
  __builtin_memcpy(&word, four, sizeof(word));
  return _mm512_set1_epi32(word);
}

template <bool kRests>
void tile_of(const uint8_t* a, int64_t lda, const uint8_t* b, int64_t units, const int32_t* start, const float* a_scale,
             const float* b_scale, float* c, int64_t ldc) {
  constexpr F8Layout kLayout(false, kRests);
  __m512 sum[kRows][kVectors];
  __m512i rest[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = _mm512_setzero_ps();
      if (kRests) rest[i][v] = _mm512_loadu_si512(start + 16 * v);
    }
  }
  const uint8_t *upper = a, *lower = a + 3 * lda;
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t k = 0; k < kUnit / kF8Step; ++k) {
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        const __m512i left = _mm512_loadu_si512(b + 128 * pair), right = _mm512_loadu_si512(b + 128 * pair + 64);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const __m512i numbers = spread((i < 3 ? upper : lower) + i % 3 * lda + 8 * k + 4 * pair);
          add_pairs(sum[i][0], numbers, left);
          add_pairs(sum[i][1], numbers, right);
        }
      }
      if constexpr (kRests) {
        const __m512i left = _mm512_loadu_si512(b + 256), right = _mm512_loadu_si512(b + 320);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const __m512i bytes = spread((i < 3 ? upper : lower) + i % 3 * lda + 2 * kUnit + 4 * k);
          add_bytes(rest[i][0], bytes, left);
          add_bytes(rest[i][1], bytes, right);
        }
      }
      b += kLayout.step;
    }
    upper += kF8Unit;
    lower += kF8Unit;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      if (kRests) {
        sum[i][v] = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, rest[i][v]), _mm512_set1_ps(kF8Rest), sum[i][v]);
      }
      const __m512 product = _mm512_mul_ps(sum[i][v], _mm512_loadu_ps(b_scale + 16 * v));
      float* to = c + i * ldc + 16 * v;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(product, _mm512_set1_ps(a_scale[i]), _mm512_loadu_ps(to)));
    }
  }
}

void tile(const uint8_t* a, int64_t lda, const uint8_t* b, bool rests, int64_t units, const int32_t* start,
          const float* a_scale, const float* b_scale, float* c, int64_t ldc, Pending&) {
  const auto run = rests ? tile_of<true> : tile_of<false>;
  for (int64_t i = 0; i < kTileRows; i += kRows) {
    run(a + i * lda, lda, b, units, start, a_scale + i, b_scale, c + i * ldc, ldc);
  }
}

void finish(bool, int64_t, Pending&) {}

// kAtOnce rows by kQueries queries: the sums of one unit, scaled, are added to the totals.
template <int kParts, int kQueries, int kAtOnce>
LGK_INLINE void few_unit(const uint8_t* const* from, const uint16_t* b, const float* a_scale, const float* b_scale,
                         int64_t ldb, __m512 (*total)[kQueries]) {
  __m512 sum[kAtOnce][kQueries];
#pragma GCC unroll 4
  for (int i = 0; i < kAtOnce; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) sum[i][q] = _mm512_setzero_ps();
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512i pairs[kAtOnce][2];
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) to_pairs(_mm512_loadu_si512(from[i] + 64 * half), pairs[i][0], pairs[i][1]);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 2
      for (int p = kParts - 1; p >= 0; --p) {
        const uint16_t* numbers = b + (q * kParts + p) * kUnit + 64 * half;
        const __m512i first = _mm512_loadu_si512(numbers), second = _mm512_loadu_si512(numbers + 32);
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) {
          add_pairs(sum[i][q], pairs[i][0], first);
          add_pairs(sum[i][q], pairs[i][1], second);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kAtOnce; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(a_scale[i]), _mm512_set1_ps(b_scale[q * ldb]));
      total[i][q] = _mm512_fmadd_ps(sum[i][q], scale, total[i][q]);
    }
  }
}

template <int kParts, int kQueries>
void few_of(const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* const* a_scale,
            const uint16_t* b, const float* b_scale, int64_t ldb, float* sums, bool add) {
  constexpr int kAtOnce = kQueries == 1 ? kFewRows : 2;
  constexpr int64_t kAhead = 2048;  // bytes
  __m512 total[kFewRows][kQueries];
#pragma GCC unroll 4
  for (int i = 0; i < kFewRows; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      total[i][q] = add ? _mm512_loadu_ps(sums + (i * kQueries + q) * kFewLanes) : _mm512_setzero_ps();
    }
  }
  for (int64_t u = 0; u < units; ++u, b += kQueries * kParts * kUnit) {
    const bool end = last != nullptr && u + 1 == units;
    const uint8_t* from[kFewRows];
    float scale[kFewRows];
#pragma GCC unroll 4
    for (int i = 0; i < kFewRows; ++i) {
      from[i] = end ? last[i] : rows[i] + u * kUnit;
      scale[i] = a_scale[i][u];
      __builtin_prefetch(rows[i] + u * kUnit + kAhead, 0, 2);
      __builtin_prefetch(rows[i] + u * kUnit + kAhead + 64, 0, 2);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kFewRows; i += kAtOnce) {
      few_unit<kParts, kQueries, kAtOnce>(from + i, b, scale + i, b_scale + u, ldb, total + i);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kFewRows; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) _mm512_storeu_ps(sums + (i * kQueries + q) * kFewLanes, total[i][q]);
  }
}

void few(const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* const* a_scale,
         const uint16_t* b, int parts, const float* b_scale, int64_t ldb, int64_t queries, float* sums, bool add) {
  const auto run = parts == 1 ? (queries == 1   ? few_of<1, 1>
                                 : queries == 2 ? few_of<1, 2>
                                 : queries == 3 ? few_of<1, 3>
                                                : few_of<1, 4>)
                              : (queries == 1   ? few_of<2, 1>
                                 : queries == 2 ? few_of<2, 2>
                                 : queries == 3 ? few_of<2, 3>
                                                : few_of<2, 4>);
  run(rows, last, units, a_scale, b, b_scale, ldb, sums, add);
}

}  // namespace

extern const F8Kernels kF8V4;
const F8Kernels kF8V4 = {{kTileRows, 4, 64, kF8Unit}, false, expand, split, tile, finish, part, few};

}  // namespace lgk
#endif
