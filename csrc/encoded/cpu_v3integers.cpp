// Integer codes by AVX2, whose sums of two products of bytes overflow their 16 bits: a query's number is a word, not
// digits, and so is a code. Two products of words are added to each 32-bit lane.
//
// A unit's words lie in the order of the codes': words of codes hold 4, 8 or 16 fields, and all words' first fields are
// followed by the second ones. Codes of 8 bits lie as their numbers do and keep their signs.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>

#include "encoded/integers.h"

#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

#define LGK_INLINE static inline __attribute__((always_inline))
#include "encoded/lanes.inc"

namespace lgk {
namespace {

constexpr int64_t kRows = 6;                     // of a tile
constexpr int64_t kUnitBytes = 2 * kUnit;        // as words
constexpr int64_t kRowBytes = 4 * kTileColumns;  // of a tile's queries: of a pair and of the one half a unit after it
constexpr int64_t kBlockUnits = 16;              // of a row, before those of the next row
constexpr int64_t kAhead = 2048;                 // bytes

LGK_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
LGK_INLINE void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
LGK_INLINE __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

// Not to be put into another order by the compiler, which keeps more sums than there are registers.
LGK_INLINE void add_in_turn(__m256i& sum, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }

// 16 words shifted so that a field is below the middle of the low byte, and what is left of them.
template <Code kCode>
LGK_INLINE __m256i field(__m256i shifted, int level) {
  return _mm256_and_si256(
      shifted, _mm256_set1_epi16(static_cast<int16_t>(((1 << code_bits(kCode)) - 1) << (level * code_bits(kCode)))));
}

float largest(const float* x, int64_t n) {
  __m256i most = _mm256_setzero_si256();  // magnitudes in the order of their bits, NaN above all
  for (int64_t i = 0; i < n; i += 8) {
    most = _mm256_max_epi32(most, _mm256_and_si256(load(x + i), _mm256_set1_epi32(0x7fffffff)));
  }
  alignas(32) int32_t lanes[8];
  store(lanes, most);
  int32_t found = 0;
  for (int32_t lane : lanes) found = lane > found ? lane : found;
  float largest;
  __builtin_memcpy(&largest, &found, sizeof(largest));
  return largest;
}

template <int kFields>
LGK_INLINE void in_order(const int16_t* numbers, int16_t* out) {
  for (int f = 0; f < kFields; ++f) {
    for (int64_t word = 0; word < kUnit / kFields; ++word) {
      out[f * (kUnit / kFields) + word] = numbers[word * kFields + f];
    }
  }
}

void to_words(Code code, const float* x, float inverse, int, int8_t* out, int32_t* sums) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const auto whole = [&](int64_t i) __attribute__((always_inline)) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm256_cvttps_epi32(_mm256_round_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor), kNearest));
  };
  alignas(32) int16_t numbers[kUnit];
  alignas(32) int32_t lanes[8];
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < kUnit; i += 16) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole(i), whole(i + 8)), 0xd8);
    store(numbers + i, words);
    sum = add_pairs(sum, words, _mm256_set1_epi16(1));
  }
  store(lanes, sum);
  sums[0] = sums[1] = 0;
  for (int32_t lane : lanes) sums[0] += code == Code::kI8 ? 0 : lane;  // codes with a sign have no offset
  int16_t* to = reinterpret_cast<int16_t*>(out);
  if (code == Code::kI8) return in_order<1>(numbers, to);
  if (code == Code::kI4) return in_order<4>(numbers, to);
  if (code == Code::kI2) return in_order<8>(numbers, to);
  in_order<16>(numbers, to);
}

void widen(const uint16_t* halves, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
  }
  for (; i < n; ++i) out[i] = _cvtsh_ss(halves[i]);
}

template <Code kCode>
void expand_units(const uint8_t* codes, int64_t units, int16_t* out) {
  constexpr int kBits = code_bits(kCode), kFields = 16 / kBits;
  for (int64_t u = 0; u < units; ++u, codes += kUnit * kBits / 8, out += kUnit) {
    if constexpr (kCode == Code::kI8) {
      for (int64_t i = 0; i < kUnit; i += 16) {
        store(out + i, _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
      }
    } else if constexpr (kCode == Code::kSign) {
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      const __m256i twice = _mm256_set_m128i(words, _mm_add_epi16(words, words));  // two fields at a time, times 2
#pragma GCC unroll 8
      for (int f = 0; f < kFields; f += 2) {
        store(out + f * 8, _mm256_and_si256(f == 0 ? twice : _mm256_srli_epi16(twice, f), _mm256_set1_epi16(2)));
      }
    } else {
      for (int64_t word = 0; word < kUnit / kFields; word += 16) {
        const __m256i words = load(codes + 2 * word);
#pragma GCC unroll 8
        for (int f = 0; f < kFields; ++f) {
          store(out + f * (kUnit / kFields) + word, field<kCode>(_mm256_srli_epi16(words, f * kBits), 0));
        }
      }
    }
  }
}

void expand(Code code, const uint8_t* codes, int64_t units, uint8_t* out) {
  int16_t* words = reinterpret_cast<int16_t*>(out);
  if (code == Code::kI8) return expand_units<Code::kI8>(codes, units, words);
  if (code == Code::kI4) return expand_units<Code::kI4>(codes, units, words);
  if (code == Code::kI2) return expand_units<Code::kI2>(codes, units, words);
  expand_units<Code::kSign>(codes, units, words);
}

void tile(const uint8_t* a, int64_t lda, const int8_t* b, int, int64_t units, const int32_t* start,
          const float* a_scale, const float* b_scale, float* c, int64_t ldc, Pending&) {
  __m256i sum[kRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sum[i][0] = load(start), sum[i][1] = load(start + 8);
  const uint8_t* third[2] = {a, a + 3 * lda};
  const auto step = [&](int64_t at) __attribute__((always_inline)) {
    const __m256i left = load(b + at / 2), right = load(b + at / 2 + 32);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, third[i / 3] + i % 3 * lda + at, sizeof(pair));
      const __m256i codes = _mm256_set1_epi32(pair);
      add_in_turn(sum[i][0], _mm256_madd_epi16(codes, left));
      add_in_turn(sum[i][1], _mm256_madd_epi16(codes, right));
    }
  };
  for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 1
    for (int64_t k = 0; k < kUnit / 4; ++k) {
      step(0);
      step(kUnitBytes / 2);
      third[0] += 4, third[1] += 4;
      b += kRowBytes;
    }
    third[0] += kUnitBytes / 2, third[1] += kUnitBytes / 2;
  }
  const __m256 scales[2] = {_mm256_loadu_ps(b_scale), _mm256_loadu_ps(b_scale + 8)};
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* to = c + i * ldc + 8 * v;
      const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][v]), scales[v]);
      _mm256_storeu_ps(to, _mm256_fmadd_ps(product, _mm256_set1_ps(a_scale[i]), _mm256_loadu_ps(to)));
    }
  }
}

void finish(int, int64_t, Pending&) {}

// Where few has the vectors of a chunk's fields of words, bytes from its start.
template <Code kCode>
struct Places {
  static constexpr int64_t kVectors = chunk_units(kCode) * kUnit / 64;
  int64_t of[2 * kVectors] = {};
  constexpr Places() {
    for (int64_t v = 0; v < 2 * kVectors; ++v) of[v / kVectors * kVectors + field_of(kCode, v % kVectors)] = 64 * v;
  }
};

// Half of a chunk: 16 words of each field, whose fields of one place in a half of a byte are multiplied before the sums
// move up to the next place.
template <Code kCode, int kSide, int kCount>
LGK_INLINE void few_half(const uint8_t* const (&codes)[kSide], int64_t at, const int8_t* b,
                         __m256i (&sum)[kSide][kCount]) {
  constexpr int kBits = code_bits(kCode), kLevels = kBits < 4 ? 4 / kBits : 1;
  constexpr int64_t kQueryBytes = kUnitBytes * chunk_units(kCode);
  static constexpr Places<kCode> kPlaces;
  const auto add = [&](const __m256i(&words)[kSide], int64_t place) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q) {
      const __m256i numbers = load(b + q * kQueryBytes + place);
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) sum[i][q] = add_pairs(sum[i][q], words[i], numbers);
    }
  };
  __m256i words[kSide];
  if constexpr (kCode == Code::kI8) {
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
        words[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[i] + at + 32 * f)));
      }
      add(words, kPlaces.of[f]);
    }
  } else {
    __m256i shifted[kSide][4];
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) {
      shifted[i][0] = load(codes[i] + at);
#pragma GCC unroll 4
      for (int j = 1; j < 4; ++j) shifted[i][j] = _mm256_srli_epi16(shifted[i][0], 4 * j);
    }
#pragma GCC unroll 4
    for (int level = 0; level < kLevels; ++level) {
#pragma GCC unroll 4
      for (int i = 0; i < kSide * kCount && level > 0; ++i) {
        sum[i / kCount][i % kCount] = _mm256_slli_epi32(sum[i / kCount][i % kCount], kBits);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const bool is_all = kBits == 4 && j == 3;  // that is left
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) words[i] = is_all ? shifted[i][j] : field<kCode>(shifted[i][j], level);
        add(words, kPlaces.of[j * kLevels + level]);
      }
    }
  }
}

// The product of both scales of the unit that a lane's numbers are of.
template <Code kCode>
LGK_INLINE __m256 factors(const float* a_scale, const float* b_scale, int half) {
  const auto of = [&](int unit) __attribute__((always_inline)) { return a_scale[unit] * b_scale[unit]; };
  if constexpr (kCode == Code::kSign) {
    return _mm256_set_m128(_mm_set1_ps(of(2 * half + 1)), _mm_set1_ps(of(2 * half)));
  } else {
    return _mm256_set1_ps(of(kCode == Code::kI2 ? half : 0));
  }
}

// A chunk, `at` bytes from the start, of kSide rows by kCount queries: its sums, scaled, are added to the totals.
template <Code kCode, int kSide, int kCount>
LGK_INLINE void few_chunk(const uint8_t* const (&codes)[kSide], int64_t at, const int8_t* b,
                          const float* const (&a_scale)[kSide], int64_t unit, const float* b_scale, int64_t ldb,
                          __m256 (&total)[kSide][kCount][2]) {
  constexpr bool kShared = chunk_units(kCode) == 1;  // one scale for both halves
  __m256i sum[kSide][kCount];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
    for (int i = 0; i < kSide * kCount && (half == 0 || !kShared); ++i) {
      sum[i / kCount][i % kCount] = _mm256_setzero_si256();
    }
    few_half<kCode, kSide, kCount>(codes, at + half * (kCode == Code::kI8 ? 16 : 32), b + 32 * half, sum);
    if (half == 0 && kShared) continue;
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 4
      for (int q = 0; q < kCount; ++q) {
        const __m256 factor = factors<kCode>(a_scale[i] + unit, b_scale + q * ldb, half);
        total[i][q][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][q]), factor, total[i][q][half]);
      }
    }
  }
}

// Takes away what the codes' offset has added.
LGK_INLINE __m256 few_offsets(const float* a_scale, int64_t units, const float* b_sum, __m256 total) {
  int64_t u = 0;
  for (; u + 8 <= units; u += 8) {
    __builtin_prefetch(a_scale + u + kBlockUnits);
    total = _mm256_fnmadd_ps(_mm256_loadu_ps(a_scale + u), _mm256_loadu_ps(b_sum + u), total);
  }
  if (u == units) return total;
  alignas(32) float rest[8] = {};
  for (int64_t i = 0; i < units - u; ++i) rest[i] = a_scale[u + i];
  return _mm256_fnmadd_ps(_mm256_load_ps(rest), _mm256_loadu_ps(b_sum + u), total);
}

// At most kBlockUnits of kSide rows, whose queries stay in the L1 cache for the rows beside them. last: the rows' codes
// of the last chunk, which may lack units, or null.
template <Code kCode, int kSide, int kCount>
void few_block(const uint8_t* const (&codes)[kSide], const uint8_t* const* last, int64_t units,
               const float* const (&a_scale)[kSide], const int8_t* b, const float* b_scale, const float* b_sum,
               int64_t ldb, float* sums) {
  constexpr int64_t kUnits = chunk_units(kCode), kBytes = kUnits * kUnit * code_bits(kCode) / 8;
  constexpr int64_t kChunk = kCount * kUnits * kUnitBytes;
  __m256 total[kSide][kCount][2];
#pragma GCC unroll 4
  for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q) {
      const float* from = sums + (i * kCount + q) * kFewLanes;
      total[i][q][0] = _mm256_loadu_ps(from), total[i][q][1] = _mm256_loadu_ps(from + 8);
      if (kCode != Code::kI8) total[i][q][0] = few_offsets(a_scale[i], units, b_sum + q * ldb, total[i][q][0]);
    }
  }
  const int64_t whole = (last == nullptr ? units : units - 1) / kUnits;
#pragma GCC unroll 1
  for (int64_t chunk = 0; chunk < whole; ++chunk) {
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 2
      for (int64_t line = 0; line < kBytes; line += 64) {
        __builtin_prefetch(codes[i] + chunk * kBytes + kAhead + line);
      }
    }
    few_chunk<kCode, kSide, kCount>(codes, chunk * kBytes, b + chunk * kChunk, a_scale, chunk * kUnits,
                                    b_scale + chunk * kUnits, ldb, total);
  }
  if (whole * kUnits < units) {
    float kept[kSide][kUnits] = {};
    const float* scales[kSide];
    const uint8_t* ends[kSide];
    for (int i = 0; i < kSide; ++i) {
      for (int64_t u = whole * kUnits; u < units; ++u) kept[i][u - whole * kUnits] = a_scale[i][u];
      scales[i] = kept[i];
      ends[i] = last[i];
    }
    few_chunk<kCode, kSide, kCount>(ends, 0, b + whole * kChunk, scales, 0, b_scale + whole * kUnits, ldb, total);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSide * kCount; ++i) {
    _mm256_storeu_ps(sums + i * kFewLanes, total[i / kCount][i % kCount][0]);
    _mm256_storeu_ps(sums + i * kFewLanes + 8, total[i / kCount][i % kCount][1]);
  }
}

// Rows that share what is loaded of a query: loads take the time of one.
constexpr int side_of(Code code, int queries) { return queries > 1 ? 1 : code == Code::kI8 ? 4 : 2; }

template <Code kCode, int kCount>
void few_rows(const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* const* a_scale,
              const int8_t* b, const float* b_scale, const float* b_sum, int64_t ldb, float* sums) {
  constexpr int kSide = side_of(kCode, kCount);
  for (int64_t u = 0; u < units; u += kBlockUnits) {
    const int64_t here = units - u < kBlockUnits ? units - u : kBlockUnits;
    const bool ends = last != nullptr && u + here == units;
    for (int64_t first = 0; first < kFewRows; first += kSide) {
      const uint8_t* codes[kSide];
      const float* scales[kSide];
      for (int i = 0; i < kSide; ++i) {
        codes[i] = rows[first + i] + u * kUnit * code_bits(kCode) / 8;
        scales[i] = a_scale[first + i] + u;
      }
      few_block<kCode, kSide, kCount>(codes, ends ? last + first : nullptr, here, scales, b + u * kCount * kUnitBytes,
                                      b_scale + u, b_sum + u, ldb, sums + first * kCount * kFewLanes);
    }
  }
}

template <Code kCode>
void few_code(const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* const* a_scale,
              const int8_t* b, const float* b_scale, const float* b_sum, int64_t ldb, int64_t queries, float* sums) {
  const auto run = queries == 1   ? few_rows<kCode, 1>
                   : queries == 2 ? few_rows<kCode, 2>
                   : queries == 3 ? few_rows<kCode, 3>
                                  : few_rows<kCode, 4>;
  run(rows, last, units, a_scale, b, b_scale, b_sum, ldb, sums);
}

void few(Code code, const uint8_t* const* rows, const uint8_t* const* last, int64_t units, const float* const* a_scale,
         const int8_t* b, int, const float* b_scale, const float* b_sum, int64_t ldb, int64_t queries, float* sums,
         bool add) {
  for (int64_t i = 0; i < kFewRows * queries * kFewLanes && !add; ++i) sums[i] = 0;
  const auto run = code == Code::kI8   ? few_code<Code::kI8>
                   : code == Code::kI4 ? few_code<Code::kI4>
                   : code == Code::kI2 ? few_code<Code::kI2>
                                       : few_code<Code::kSign>;
  run(rows, last, units, a_scale, b, b_scale, b_sum, ldb, queries, sums);
}

}  // namespace

extern const IntegerKernels kIntegersV3;
const IntegerKernels kIntegersV3 = {
    {{kRows, 16, 64, kUnitBytes}, expand, tile, finish}, kMostDigits, largest, to_words, widen, few, sum_lanes};

}  // namespace lgk
#endif
