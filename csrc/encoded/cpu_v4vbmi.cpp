// AVX512-VBMI beside x86-64-v4: fp8 to bf16 by tables of bytes.
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "common/kernels.h"
#include "encoded/f8.h"
#include "encoded/kernels.h"

#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vbmi")

#define LGK_VECTOR_BYTES 64
#define LGK_F16C
#include "common/vectors.inc"

namespace lgk {
namespace {

constexpr int64_t kF8Step = 64;
constexpr float kF8Scale = 1.0f;

struct alignas(64) F8Tables {
  uint8_t high[128], low[128];  // of the bf16 that a magnitude is
  uint8_t order[64];            // so that byte pairs of an in-lane interleaving come apart as neighbours
};

constexpr F8Tables make_tables() {
  F8Tables tables = {};
  for (int size = 0; size < 128; ++size) {
    tables.high[size] = static_cast<uint8_t>(bf16_of_f8(size) >> 8);
    tables.low[size] = static_cast<uint8_t>(bf16_of_f8(size) & 0xff);
  }
  for (int i = 0; i < 64; ++i) {
    const int lane = i / 16, half = i % 16 / 8, word = i % 8;
    tables.order[i] = static_cast<uint8_t>(32 * half + 16 * (word % 2) + 4 * lane + word / 2);
  }
  return tables;
}

constexpr F8Tables kTables = make_tables();

LGK_INLINE void load_f8(const uint8_t* codes, int64_t count, Vec<float> (&numbers)[4]) {
  const __mmask64 kept = count < kF8Step ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
  const __m512i natural = _mm512_maskz_loadu_epi8(kept, codes);
  const __m512i code = _mm512_maskz_permutexvar_epi8(~uint64_t{0}, _mm512_load_si512(kTables.order), natural);
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_load_si512(kTables.high), code, _mm512_load_si512(kTables.high + 64));
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(kTables.low), code, _mm512_load_si512(kTables.low + 64));
  const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi8(static_cast<char>(0x80)));
  const __m512i signed_high = _mm512_or_si512(high, sign);
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  for (int half = 0; half < 2; ++half) {
    const __m512i pairs = half == 0 ? _mm512_maskz_unpacklo_epi8(~uint64_t{0}, low, signed_high)
                                    : _mm512_maskz_unpackhi_epi8(~uint64_t{0}, low, signed_high);
    numbers[2 * half] = (Vec<float>)_mm512_maskz_slli_epi32(0xffff, pairs, 16);
    numbers[2 * half + 1] = (Vec<float>)_mm512_and_si512(pairs, upper);
  }
}

}  // namespace
}  // namespace lgk

#include "encoded/few_decoded.inc"

namespace lgk {

extern const decltype(EncodedKernels::few_f8) kFewF8V4Vbmi;
const decltype(EncodedKernels::few_f8) kFewF8V4Vbmi = few_f8;

}  // namespace lgk
#endif
