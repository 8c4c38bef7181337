// Intel's matrix unit beside AVX512-VNNI: many queries meet integer codes, as signed bytes, in blocks of four tiles.
#include "common/isa.h"

#if LGK_HAS_AMX
#include <immintrin.h>

#include <cstdint>

#include "encoded/integers.h"

#pragma GCC target( \
    "avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,amx-tile,amx-int8")

#include "encoded/tiles.inc"
#include "encoded/units.inc"

namespace lgk {
namespace {

// GCC 12 warns of its own undefined operands in the unmasked intrinsic.
LGK_INLINE __m512 floats_of(const int32_t* sums) { return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_load_si512(sums)); }

// Scales and adds some rows of what is pending.
template <int kDigits>
struct Scaled : Unscaled {
  LGK_METHOD void operator()(int slot) const {
    const __m512 left_scale = _mm512_loadu_ps(b_scale);
    const __m512 right_scale = kDigits == 1 ? _mm512_loadu_ps(b_scale + kTileSide) : left_scale;
#pragma GCC unroll 4
    for (int i = slot * kSlotRows; i < (slot + 1) * kSlotRows; ++i) {
      const int32_t* sum = sums + i * kTileColumns;
      const __m512 left = floats_of(sum), right = floats_of(sum + kTileSide), scale = _mm512_set1_ps(a_scale[i]);
      float* to = c + i * ldc;
      if constexpr (kDigits == 1) {
        add(_mm512_mul_ps(left, left_scale), scale, to);
        add(_mm512_mul_ps(right, right_scale), scale, to + kTileSide);
      } else {
        add(_mm512_mul_ps(_mm512_fmadd_ps(right, _mm512_set1_ps(256.0f), left), left_scale), scale, to);
      }
    }
  }

 private:
  LGK_METHOD static void add(__m512 product, __m512 scale, float* to) {
    _mm512_storeu_ps(to, _mm512_fmadd_ps(product, scale, _mm512_loadu_ps(to)));
  }
};

template <int kDigits>
void tile_digits(const uint8_t* a, int64_t lda, const uint8_t* b, int64_t units, int64_t ldc, Pending& pending) {
  constexpr int64_t kUnitSteps = kUnit / kStepBytes;
  clear_tiles();
  if (pending.c != nullptr) {
    add_steps<SignedBytes>(a, lda, b, units * kUnitSteps, Scaled<kDigits>{last_of(pending, ldc)});
  } else {
    add_steps<SignedBytes>(a, lda, b, units * kUnitSteps, Nothing{});
  }
  store_sums(pending.sums[pending.turn]);
}

void tile(const uint8_t* a, int64_t lda, const int8_t* b, int digits, int64_t units, const int32_t*,
          const float* a_scale, const float* b_scale, float* c, int64_t ldc, Pending& pending) {
  const auto run = digits == 1 ? tile_digits<1> : tile_digits<2>;
  run(a, lda, reinterpret_cast<const uint8_t*>(b), units, ldc, pending);
  leave(pending, a_scale, b_scale, c);
}

void finish(int digits, int64_t ldc, Pending& pending) {
  (digits == 1 ? scale_last<Scaled<1>> : scale_last<Scaled<2>>)(ldc, pending);
}

}  // namespace

extern const IntegerTiles kTilesV4Amx;
const IntegerTiles kTilesV4Amx = {{kRows, 8, 256, kUnit}, expand<true>, tile, finish};

}  // namespace lgk
#endif
