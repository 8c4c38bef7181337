// AVX2: signs of rows pick the sums of four of a query's numbers from tables.
//
// A vector holds one byte of codes of each of 16 rows, and the same of their next unit, so that one vpshufb finds 32
// bytes of sums. They are added as words of two rows' bytes, and those at odd places once more by themselves: what they
// leave of the words' sums is the even places'.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "encoded/signs.h"

#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

#define LGK_INLINE static inline __attribute__((always_inline))

namespace lgk {
namespace {

constexpr int kUnitCodes = kUnit / 8;  // bytes
constexpr int kUnits = 2;              // whose codes of a row lie side by side in a vector
constexpr int kLane = 16;              // bytes; rows of a vector
constexpr int kSides = kSignRows / kLane;
constexpr int kFours = kSignRows / 4;       // vectors of sums: of four rows and kUnits units
constexpr int kScales = 8;                  // units of a vector of a row's scales
constexpr int kVector = 32, kLine = 64;     // bytes
constexpr int kChunk = kLine / kUnitCodes;  // units of a line of a row
constexpr int kTable = kUnits * kLane;      // bytes: [position][nibble][low and high byte of a sum][unit][16]
constexpr int kFetches = 2;                 // for a unit of a query
constexpr int kOffset = 128;                // by which a table's high bytes lie above the sums'

LGK_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
LGK_INLINE void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

// The row at a place of a lane, so that the sums of even places, then of odd ones, come out in the rows' order.
constexpr int row_at(int place) { return place % 2 * (kLane / 2) + place / 2; }

// Two of four steps that bring byte k of 16 rows together: each puts the bytes of vectors i and 8 + i in turns.
LGK_INLINE void two_steps(__m256i a, __m256i b, __m256i c, __m256i d, __m256i* out) {
  const __m256i low = _mm256_unpacklo_epi8(a, c), high = _mm256_unpackhi_epi8(a, c);
  const __m256i more_low = _mm256_unpacklo_epi8(b, d), more_high = _mm256_unpackhi_epi8(b, d);
  store(out, _mm256_unpacklo_epi8(low, more_low));
  store(out + 1, _mm256_unpackhi_epi8(low, more_low));
  store(out + 2, _mm256_unpacklo_epi8(high, more_high));
  store(out + 3, _mm256_unpackhi_epi8(high, more_high));
}

struct Chunk {
  __m256i codes[kChunk / kUnits][kSides][kUnitCodes];  // byte k of two units of 16 rows
};

// A line of every row. It is read once: lines of rows that lie a page apart drive each other out of the L1 cache.
LGK_INLINE void load_chunk(const uint8_t* const* placed, int64_t at, Chunk& to) {
  __m256i half_way[kChunk / kUnits][kLane];
#pragma GCC unroll 1
  for (int s = 0; s < kSides; ++s) {
    const uint8_t* const* rows = placed + s * kLane;
#pragma GCC unroll 1
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
      for (int half = 0; half < kChunk / kUnits; ++half) {
        const int64_t from = at + half * kVector;
        two_steps(load(rows[i] + from), load(rows[4 + i] + from), load(rows[8 + i] + from), load(rows[12 + i] + from),
                  half_way[half] + 4 * i);
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < kChunk / kUnits; ++half) {
      const __m256i* from = half_way[half];
#pragma GCC unroll 1
      for (int i = 0; i < 4; ++i) {
        two_steps(from[i], from[4 + i], from[8 + i], from[12 + i], to.codes[half][s] + 4 * i);
      }
    }
  }
}

// scales[u][f]: those of units at + 2 u and at + 2 u + 1 of rows 4 f .. 4 f + 3.
void load_scales(const float* const* rows, int64_t at, int64_t units, __m256 (*scales)[kFours]) {
  const int count = static_cast<int>(units < kScales ? units : kScales);
  const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
  const __m256i even_first = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
#pragma GCC unroll 1
  for (int f = 0; f < kFours; ++f, rows += 4) {
    __m256 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = _mm256_permutevar8x32_ps(_mm256_maskload_ps(rows[i] + at, kept), even_first);
    const __m256 low = _mm256_unpacklo_ps(x[0], x[1]), high = _mm256_unpackhi_ps(x[0], x[1]);
    const __m256 more_low = _mm256_unpacklo_ps(x[2], x[3]), more_high = _mm256_unpackhi_ps(x[2], x[3]);
    scales[0][f] = _mm256_shuffle_ps(low, more_low, 0x44);
    scales[1][f] = _mm256_shuffle_ps(low, more_low, 0xee);
    scales[2][f] = _mm256_shuffle_ps(high, more_high, 0x44);
    scales[3][f] = _mm256_shuffle_ps(high, more_high, 0xee);
  }
}

// Sums of bytes found in tables, as words: of two neighbours' bytes in one, and of those at odd places.
struct Sums {
  __m256i all, odd;
};

// Not to be put into another order by the compiler, which keeps more sums than there are registers.
LGK_INLINE void add_in_turn(__m256i& sum, __m256i x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }

LGK_INLINE void add_found(__m256i table, __m256i index, __m256i odd_places, Sums& sums) {
  const __m256i found = _mm256_shuffle_epi8(table, index);
  add_in_turn(sums.all, found);
  add_in_turn(sums.odd, _mm256_maddubs_epi16(found, odd_places));
}

LGK_INLINE __m256i even(const Sums& sums) { return _mm256_sub_epi16(sums.all, _mm256_slli_epi16(sums.odd, 8)); }

// total += two units of one query.
LGK_INLINE void add_units(const __m256i (&codes)[kSides][kUnitCodes], const uint8_t* tables, const __m256* scale,
                          const float* query_scales, __m256 (&total)[kFours], Ahead& ahead) {
  constexpr int kLookups = 2 * kUnitCodes;
  __m256i nibble = _mm256_set1_epi8(15), odd_places = _mm256_set1_epi16(0x100);
  asm("" : "+x"(nibble), "+x"(odd_places));  // kept in registers
  const __m256i zero = _mm256_setzero_si256();
  Sums low[kSides] = {{zero, zero}, {zero, zero}}, high[kSides] = {{zero, zero}, {zero, zero}};
#pragma GCC unroll 1
  for (int k = 0; k < kUnitCodes; ++k, tables += 4 * kTable) {
    if (k % (kUnitCodes / kUnits / kFetches) == 0) ahead.fetch();
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      const __m256i low_bytes = load(tables + 2 * n * kTable), high_bytes = load(tables + (2 * n + 1) * kTable);
#pragma GCC unroll 2
      for (int s = 0; s < kSides; ++s) {
        const __m256i moved = n == 0 ? codes[s][k] : _mm256_srli_epi16(codes[s][k], 4);
        const __m256i index = _mm256_and_si256(moved, nibble);
        add_found(low_bytes, index, odd_places, low[s]);
        add_found(high_bytes, index, odd_places, high[s]);
      }
    }
  }
  const __m256i offset = _mm256_set1_epi16(kLookups * kOffset), bases = _mm256_set1_epi32(0x1000001);
  const __m256 query_scale = _mm256_set_m128(_mm_set1_ps(query_scales[1]), _mm_set1_ps(query_scales[0]));
#pragma GCC unroll 2
  for (int s = 0; s < kSides; ++s) {
    const __m256i places[2][2] = {{even(low[s]), _mm256_sub_epi16(even(high[s]), offset)},
                                  {low[s].odd, _mm256_sub_epi16(high[s].odd, offset)}};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i* of = places[v / 2];
      const __m256i pairs = v % 2 == 0 ? _mm256_unpacklo_epi16(of[0], of[1]) : _mm256_unpackhi_epi16(of[0], of[1]);
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, bases));
      total[4 * s + v] = _mm256_fmadd_ps(sum, _mm256_mul_ps(scale[4 * s + v], query_scale), total[4 * s + v]);
    }
  }
}

template <int kQueries>
void multiply_queries(const uint8_t* const* rows, int64_t bytes, const float* const* a_scale, int64_t units,
                      const uint8_t* tables, const float* b_scale, int64_t ldb, float* sums, Next& next) {
  const uint8_t* placed[kSignRows];
  for (int i = 0; i < kSignRows; ++i) placed[i] = rows[i / kLane * kLane + row_at(i % kLane)];
  __m256 total[kQueries][kFours], scales[kScales / kUnits][kFours];
  for (int i = 0; i < kQueries * kFours; ++i) total[i / kFours][i % kFours] = _mm256_setzero_ps();
  Ahead ahead = next.codes;
  Chunk chunk;
  for (int64_t u = 0; u < units; u += kUnits) {
    if (u % kScaleUnits == 0) next.scales.fetch();
    if (u % kScales == 0) load_scales(a_scale, u, units - u, scales);
    if (u % kChunk == 0) {
      const int64_t at = u * kUnitCodes;
      if (at + kLine <= bytes) {
        load_chunk(placed, at, chunk);
      } else {
        uint8_t ends[kSignRows][kLine] = {};
        const uint8_t* from[kSignRows];
        for (int i = 0; i < kSignRows; ++i) {
          std::memcpy(ends[i], placed[i] + at, bytes - at);
          from[i] = ends[i];
        }
        load_chunk(from, 0, chunk);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      add_units(chunk.codes[u % kChunk / kUnits], tables, scales[u % kScales / kUnits], b_scale + q * ldb + u, total[q],
                ahead);
      tables += kUnits * kSignTable;
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int f = 0; f < kFours; ++f, sums += 4) {
      const __m128 both = _mm_add_ps(_mm256_castps256_ps128(total[q][f]), _mm256_extractf128_ps(total[q][f], 1));
      _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), both));
    }
  }
}

float largest_sum(const float* x) {
  const __m256 size = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const auto sizes = [&](int64_t i)
                         __attribute__((always_inline)) { return _mm256_and_ps(_mm256_loadu_ps(x + i), size); };
  const auto halves = [&](int64_t i) __attribute__((always_inline)) { return _mm256_hadd_ps(sizes(i), sizes(i + 8)); };
  __m256i most = _mm256_setzero_si256();  // in the order of their bits, NaN above all
  for (int64_t i = 0; i < kUnit; i += 32) {
    most = _mm256_max_epi32(most, _mm256_castps_si256(_mm256_hadd_ps(halves(i), halves(i + 16))));
  }
  alignas(32) uint32_t lanes[8];
  store(lanes, most);
  uint32_t bits = 0;
  for (uint32_t lane : lanes) bits = lane > bits ? lane : bits;
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  return largest;
}

LGK_INLINE __m256i nearest(__m256 sum) {
  return _mm256_cvttps_epi32(_mm256_round_ps(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// tables [position][nibble][low and high byte of a sum][unit % kUnits][16], by the positions of bytes of codes.
void make_tables(const float* x, float inverse, int64_t unit, uint8_t* tables) {
  tables += unit % kUnits * kLane;
  const __m256 minus = _mm256_set1_ps(-0.0f), factor = _mm256_set1_ps(inverse);
  // the signs that bits 0 to 2 of an entry stand for
  const __m256 signs[3] = {_mm256_blend_ps(minus, _mm256_setzero_ps(), 0xaa),
                           _mm256_blend_ps(minus, _mm256_setzero_ps(), 0xcc),
                           _mm256_blend_ps(minus, _mm256_setzero_ps(), 0xf0)};
  for (int64_t four = 0; four < kUnit; four += 4, tables += 2 * kTable) {
    __m256 sum = _mm256_setzero_ps();
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      sum = _mm256_add_ps(sum, _mm256_xor_ps(_mm256_mul_ps(_mm256_set1_ps(x[four + i]), factor), signs[i]));
    }
    const __m256 last = _mm256_mul_ps(_mm256_set1_ps(x[four + 3]), factor);
    const __m256i without = nearest(_mm256_sub_ps(sum, last)), with = nearest(_mm256_add_ps(sum, last));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(without, with), 0xd8);
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
    const __m256i high = _mm256_add_epi16(_mm256_srai_epi16(words, 8), _mm256_set1_epi16(kOffset));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tables), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tables + kTable), _mm256_extracti128_si256(bytes, 1));
  }
}

}  // namespace

extern const SignKernels kSignsV3;
const SignKernels kSignsV3 = {
    kUnits,      kFetches,    true,
    largest_sum, make_tables, {multiply_queries<1>, multiply_queries<2>, multiply_queries<3>, multiply_queries<4>}};

}  // namespace lgk
#endif
