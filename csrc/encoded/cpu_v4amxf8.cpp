// Intel's matrix unit beside AVX512-VBMI: fp8 rows and many queries, in blocks of four tiles.
#include "common/isa.h"

#if LGK_HAS_AMX
#include <immintrin.h>

#include <cstdint>

#include "encoded/f8.h"

#pragma GCC target( \
    "avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,amx-tile,amx-bf16,amx-int8")

#include "encoded/tiles.inc"

namespace lgk {
namespace {

// Scales and adds some rows of what is pending.
template <bool kRests>
struct Scaled : Unscaled {
  LGK_METHOD void operator()(int slot) const {
#pragma GCC unroll 2
    for (int v = 0; v < kTileColumns; v += kTileSide) {
      const __m512 column_scale = _mm512_loadu_ps(b_scale + v);
#pragma GCC unroll 4
      for (int i = slot * kSlotRows; i < (slot + 1) * kSlotRows; ++i) {
        const int32_t* from = sums + i * kTileColumns + v;
        __m512 sum = _mm512_castsi512_ps(_mm512_load_si512(from));
        if constexpr (kRests) {
          const __m512i rest = _mm512_load_si512(from + Pending::kSums);
          sum = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, rest), _mm512_set1_ps(kF8Rest), sum);
        }
        float* to = c + i * ldc + v;
        const __m512 product = _mm512_mul_ps(sum, column_scale);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(product, _mm512_set1_ps(a_scale[i]), _mm512_loadu_ps(to)));
      }
    }
  }
};

// Adds kSteps steps of each unit.
template <class Numbers, int64_t kSteps, class Scale>
LGK_INLINE void add_units(const uint8_t* a, int64_t lda, const uint8_t* b, int64_t unit_bytes, int64_t units,
                          const Scale& scale) {
  add_steps<Numbers>(a, lda, b, kSteps, scale);
  for (int64_t u = 1; u < units; ++u) {
    add_steps<Numbers>(a + u * kF8Unit, lda, b + u * unit_bytes, kSteps, Nothing{});
  }
}

template <bool kRests>
void tile_of(const uint8_t* a, int64_t lda, const uint8_t* b, int64_t units, const int32_t* start, int64_t ldc,
             Pending& pending) {
  constexpr F8Layout kLayout(true, kRests);
  constexpr int64_t kPairSteps = 2 * kUnit / kStepBytes, kByteSteps = kUnit / kStepBytes;
  int32_t* sums = pending.sums[pending.turn];
  clear_tiles();
  if (pending.c != nullptr) {
    add_units<Pairs, kPairSteps>(a, lda, b, kLayout.unit, units, Scaled<kRests>{last_of(pending, ldc)});
  } else {
    add_units<Pairs, kPairSteps>(a, lda, b, kLayout.unit, units, Nothing{});
  }
  store_sums(sums);
  if constexpr (kRests) {
    load_tile<0>(start, 0);  // the same in every row
    load_tile<1>(start + kTileSide, 0);
    load_tile<2>(start, 0);
    load_tile<3>(start + kTileSide, 0);
    add_units<UnsignedBytes, kByteSteps>(a + 2 * kUnit, lda, b + kLayout.first_rest, kLayout.unit, units, Nothing{});
    store_sums(sums + Pending::kSums);
  }
}

void tile(const uint8_t* a, int64_t lda, const uint8_t* b, bool rests, int64_t units, const int32_t* start,
          const float* a_scale, const float* b_scale, float* c, int64_t ldc, Pending& pending) {
  (rests ? tile_of<true> : tile_of<false>)(a, lda, b, units, start, ldc, pending);
  leave(pending, a_scale, b_scale, c);
}

void finish(bool rests, int64_t ldc, Pending& pending) {
  (rests ? scale_last<Scaled<true>> : scale_last<Scaled<false>>)(ldc, pending);
}

}  // namespace

// All else, which this leaves out, is that of kF8V4.
extern const F8Kernels kF8TilesV4Amx;
const F8Kernels kF8TilesV4Amx = {{kRows, 4, 256, kF8Unit}, true, nullptr, nullptr, tile, finish, nullptr, nullptr};

}  // namespace lgk
#endif
