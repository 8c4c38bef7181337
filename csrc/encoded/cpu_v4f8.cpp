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

void expand(const uint8_t* codes, int64_t units, uint8_t* out) {
  for (int64_t half = 0; half < 2 * units; ++half) {
    uint8_t* unit = out + half / 2 * kF8Unit;
    const __m512i code = _mm512_loadu_si512(codes + 64 * half);
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi8(static_cast<char>(0x80)));
    const __m512i high = _mm512_or_si512(look_up(kTables.high, code), sign), low = look_up(kTables.low, code);
    _mm512_storeu_si512(unit + half % 2 * 128, _mm512_maskz_unpacklo_epi8(kAllBytes, low, high));
    _mm512_storeu_si512(unit + half % 2 * 128 + 64, _mm512_maskz_unpackhi_epi8(kAllBytes, low, high));
    const __m512i byte = look_up(kTables.byte, code);
    const __m512i signed_byte = _mm512_mask_sub_epi8(byte, _mm512_movepi8_mask(code), _mm512_setzero_si512(), byte);
    _mm512_storeu_si512(unit + 2 * kUnit + half % 2 * 64, signed_byte);
  }
}

int32_t split(const float* x, float inverse, bool whole, uint16_t* numbers, int8_t* rests) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < kUnit; i += 16) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse));
    if (whole) scaled = _mm512_maskz_roundscale_ps(0xffff, scaled, kNearest);
    const __m256i leading = (__m256i)_mm512_cvtneps_pbh(scaled);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers + i), leading);
    const __m512i wide = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, leading), 16);
    const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(scaled, _mm512_castsi512_ps(wide)), _mm512_set1_ps(kRestUnits));
    const __m512i units = _mm512_maskz_cvt_roundps_epi32(0xffff, rest, kNearest);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rests + i), _mm512_maskz_cvtsepi32_epi8(0xffff, units));
    sum = _mm512_add_epi32(sum, units);
  }
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, sum);
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += lanes[i];
  return total;
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

}  // namespace

extern const F8Kernels kF8V4;
const F8Kernels kF8V4 = {{kTileRows, 4, 64, kF8Unit}, false, expand, split, tile, finish};

}  // namespace lgk
#endif
