// AVX512-VBMI and VNNI beside x86-64-v4: signs of rows pick the sums of four of a query's numbers from tables.
//
// A vector holds four bytes of codes of each of 16 rows. Each byte's position has a table of 16 sums for its lower and
// one for its upper four bits, so one vpermb finds 64 bytes of sums; vpdpbusd adds up those of a row.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "encoded/signs.h"

#pragma GCC target( \
    "avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,avx512vbmi")

#define LGK_INLINE static inline __attribute__((always_inline))

namespace lgk {
namespace {

constexpr int kSide = 16;                             // rows of a vector
constexpr int kSides = kSignRows / kSide;             // vectors that share what is read of the tables
constexpr int64_t kUnitCodes = kUnit / 8;             // bytes
constexpr int64_t kChunk = 64 / kUnitCodes;           // units of a vector of a row
constexpr int kNibbles = 2, kVectors = 4 * kNibbles;  // of each byte of the sums of a unit

// sum + four products in each lane. GCC 12 copies the operands of the intrinsic to and fro.
LGK_INLINE void add_products(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

LGK_INLINE __m512i join(__m512i a, __m512i b, int lanes) {
  return lanes == 0x44   ? _mm512_maskz_shuffle_i64x2(0xff, a, b, 0x44)
         : lanes == 0xee ? _mm512_maskz_shuffle_i64x2(0xff, a, b, 0xee)
         : lanes == 0x88 ? _mm512_maskz_shuffle_i64x2(0xff, a, b, 0x88)
                         : _mm512_maskz_shuffle_i64x2(0xff, a, b, 0xdd);
}

// Lane j of out[i] = lane i of in[j], lanes of 16 bytes.
LGK_INLINE void transpose_lanes(const __m512i (&in)[4], __m512i (&out)[4]) {
  const __m512i low = join(in[0], in[1], 0x44), high = join(in[0], in[1], 0xee);
  const __m512i more_low = join(in[2], in[3], 0x44), more_high = join(in[2], in[3], 0xee);
  out[0] = join(low, more_low, 0x88);
  out[1] = join(low, more_low, 0xdd);
  out[2] = join(high, more_high, 0x88);
  out[3] = join(high, more_high, 0xdd);
}

// The same for the four bytes of each lane.
LGK_INLINE void transpose_fours(const __m512i* in, __m512i (&out)[4]) {
  const __m512i a = _mm512_maskz_unpacklo_epi32(0xffff, in[0], in[1]);
  const __m512i b = _mm512_maskz_unpackhi_epi32(0xffff, in[0], in[1]);
  const __m512i c = _mm512_maskz_unpacklo_epi32(0xffff, in[2], in[3]);
  const __m512i d = _mm512_maskz_unpackhi_epi32(0xffff, in[2], in[3]);
  out[0] = _mm512_maskz_unpacklo_epi64(0xff, a, c);
  out[1] = _mm512_maskz_unpackhi_epi64(0xff, a, c);
  out[2] = _mm512_maskz_unpacklo_epi64(0xff, b, d);
  out[3] = _mm512_maskz_unpackhi_epi64(0xff, b, d);
}

// [unit of a chunk][i]: that unit's codes, or scales of four units, of rows i, 4 + i, 8 + i and 12 + i.
struct Lanes {
  __m512i of[4][4];
};

LGK_INLINE __mmask64 bytes_kept(int64_t bytes) {
  return bytes >= 64 ? ~uint64_t{0} : bytes <= 0 ? 0 : (uint64_t{1} << bytes) - 1;
}

template <typename T>
LGK_INLINE void load_lanes(const T* const* rows, int64_t at, __mmask64 kept, int i, Lanes& to) {
  __m512i lines[4], lanes[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) lines[j] = _mm512_maskz_loadu_epi8(kept, rows[4 * j + i] + at);
  transpose_lanes(lines, lanes);
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u) to.of[u][i] = lanes[u];
}

// scales[u]: those of unit u of 16 rows.
LGK_INLINE void load_scales(const float* const* rows, int64_t at, int64_t units, __m512i (&scales)[kScaleUnits]) {
  Lanes lanes;
  for (int i = 0; i < 4; ++i) load_lanes(rows, at, bytes_kept(4 * units), i, lanes);
  for (int u = 0; u < 4; ++u) {
    __m512i four[4];
    transpose_fours(lanes.of[u], four);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) scales[4 * u + i] = four[i];
  }
}

// total[side] += one unit of one query; codes [side][c]: bytes 4 c .. 4 c + 3 of each row.
LGK_INLINE void add_unit(const __m512i (&codes)[kSides][4], const uint8_t* tables, const __m512 (&scale)[kSides],
                         float query_scale, __m512 (&total)[kSides], Ahead& ahead) {
  const __m512i place = _mm512_set1_epi32(0x30201000), nibble = _mm512_set1_epi8(15), one = _mm512_set1_epi8(1);
  __m512i low[kSides], high[kSides];
#pragma GCC unroll 2
  for (int s = 0; s < kSides; ++s) low[s] = high[s] = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
#pragma GCC unroll 2
    for (int n = 0; n < kNibbles; ++n) {
      const __m512i low_bytes = _mm512_loadu_si512(tables), high_bytes = _mm512_loadu_si512(tables + 64);
      tables += 128;
      ahead.fetch();
#pragma GCC unroll 2
      for (int s = 0; s < kSides; ++s) {
        const __m512i moved = n == 0 ? codes[s][c] : _mm512_maskz_srli_epi16(~uint32_t{0}, codes[s][c], 4);
        const __m512i index = _mm512_ternarylogic_epi32(moved, nibble, place, 0xea);  // moved & nibble | place
        add_products(low[s], _mm512_maskz_permutexvar_epi8(~uint64_t{0}, index, low_bytes), one);
        add_products(high[s], one, _mm512_maskz_permutexvar_epi8(~uint64_t{0}, index, high_bytes));
      }
    }
  }
#pragma GCC unroll 2
  for (int s = 0; s < kSides; ++s) {
    const __m512i sum = _mm512_add_epi32(low[s], _mm512_maskz_slli_epi32(0xffff, high[s], 8));
    const __m512 factor = _mm512_mul_ps(scale[s], _mm512_set1_ps(query_scale));
    total[s] = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, sum), factor, total[s]);
  }
}

// A chunk's units are multiplied while the next chunk's codes are brought into the lanes.
template <int kQueries>
void multiply_queries(const uint8_t* const* rows, int64_t bytes, const float* const* a_scale, int64_t units,
                      const uint8_t* tables, const float* b_scale, int64_t ldb, float* sums, Next& next) {
  __m512 total[kQueries][kSides];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 2
    for (int s = 0; s < kSides; ++s) total[q][s] = _mm512_loadu_ps(sums + (q * kSides + s) * kSide);
  }
  Lanes chunks[2][kSides];
  __m512i scales[kSides][kScaleUnits];
  for (int s = 0; s < kSides; ++s) {
    for (int i = 0; i < 4; ++i) load_lanes(rows + s * kSide, 0, bytes_kept(bytes), i, chunks[0][s]);
  }
  Ahead ahead = next.codes;
  for (int64_t start = 0; start < units; start += kChunk) {
    if (start % kScaleUnits == 0) {
      next.scales.fetch();
      for (int s = 0; s < kSides; ++s) load_scales(a_scale + s * kSide, start, units - start, scales[s]);
    }
    const Lanes* here = chunks[start / kChunk % 2];
    Lanes* after = chunks[start / kChunk % 2 ^ 1];
    const int64_t at = (start + kChunk) * kUnitCodes;
    const __mmask64 kept = bytes_kept(bytes - at);
#pragma GCC unroll 1
    for (int u = 0; u < kChunk; ++u) {
      __m512i codes[kSides][4];
#pragma GCC unroll 2
      for (int s = 0; s < kSides; ++s) transpose_fours(here[s].of[u], codes[s]);
#pragma GCC unroll 2
      for (int s = 0; s < kSides; ++s) load_lanes(rows + s * kSide, at, kept, u, after[s]);
      __m512 scale[kSides];
#pragma GCC unroll 2
      for (int s = 0; s < kSides; ++s) scale[s] = _mm512_castsi512_ps(scales[s][start % kScaleUnits + u]);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        add_unit(codes, tables, scale, b_scale[q * ldb + start + u], total[q], ahead);
        tables += kSignTable;
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 2
    for (int s = 0; s < kSides; ++s) _mm512_storeu_ps(sums + (q * kSides + s) * kSide, total[q][s]);
  }
}

// The sums of the magnitudes of four numbers each.
LGK_INLINE __m512 sums_of_four(__m512 x) {
  const __m512 size = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
  const __m512 two = _mm512_add_ps(size, _mm512_maskz_permute_ps(0xffff, size, 0xb1));
  return _mm512_add_ps(two, _mm512_maskz_permute_ps(0xffff, two, 0x4e));
}

float largest_sum(const float* x) {
  __m512i most = _mm512_setzero_si512();  // in the order of their bits, NaN above all
  for (int64_t i = 0; i < kUnit; i += 16) {
    most = _mm512_maskz_max_epi32(0xffff, most, _mm512_castps_si512(sums_of_four(_mm512_loadu_ps(x + i))));
  }
  alignas(64) uint32_t lanes[16];
  _mm512_store_si512(lanes, most);
  uint32_t bits = 0;
  for (int i = 0; i < 16; i += 4) bits = lanes[i] > bits ? lanes[i] : bits;
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  return largest;
}

// Lane e of the result: the four numbers with the signs that the bits of e stand for, added.
LGK_INLINE __m512 signed_sums(const float* four) {
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    constexpr __mmask16 kSet[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
    const __m512 x = _mm512_set1_ps(four[i]);
    sum = _mm512_mask_add_ps(_mm512_sub_ps(sum, x), kSet[i], sum, x);
  }
  return sum;
}

// tables [position / 4][nibble][low and high byte of a sum][position % 4][16], by the positions of bytes of codes.
void make_tables(const float* x, float inverse, int64_t, uint8_t* tables) {
  alignas(64) float scaled[kUnit];
  for (int64_t i = 0; i < kUnit; i += 16) {
    _mm512_store_ps(scaled + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
  }
  for (int64_t byte = 0; byte < kUnitCodes; ++byte) {
    for (int64_t n = 0; n < kNibbles; ++n) {
      uint8_t* to = tables + (byte / 4 * kNibbles + n) * 128 + byte % 4 * 16;
      const __m512i sums = _mm512_maskz_cvt_roundps_epi32(0xffff, signed_sums(scaled + 8 * byte + 4 * n),
                                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, sums));
      const __m512i high = _mm512_maskz_srli_epi32(0xffff, sums, 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 64), _mm512_maskz_cvtepi32_epi8(0xffff, high));
    }
  }
}

}  // namespace

extern const SignKernels kSignsV4Vbmi;
const SignKernels kSignsV4Vbmi = {
    1,           kVectors,    false,
    largest_sum, make_tables, {multiply_queries<1>, multiply_queries<2>, multiply_queries<3>, multiply_queries<4>}};

}  // namespace lgk
#endif
