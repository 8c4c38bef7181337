// Intel's matrix unit beside AVX-512: products of two operands of bf16.
//
// Operands are packed as pairs, as for AVX512-BF16: so a panel's columns are what a tile of the right operand is. A
// product of tiles adds 16 pairs to an fp32 sum, their even terms and their odd ones on their own, rounds to nearest
// even, takes subnormal operands for 0 and flushes subnormal results to 0. A strip's products, 32 at most, are added up
// in the tiles, which is no longer a chain than a panel's is elsewhere.
#include "common/isa.h"

#if LGK_HAS_AMX
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "common/amx.h"
#include "common/kernels.h"

#pragma GCC target(                                                                                   \
    "avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16," \
    "amx-tile,amx-bf16,amx-int8")

#define LGK_VECTOR_BYTES 64
#define LGK_F16C
#include "common/tile_unit.inc"
#include "common/vectors.inc"

namespace lgk {
namespace {

constexpr int64_t kRowBlock = 48;   // of outer
constexpr int kSums = 4;            // tiles of sums
constexpr int64_t kMostGroups = 4;  // of kSums tiles of columns, which rows meet as soon as they are converted
constexpr int64_t kPanelSteps = kPanel / kTileSide;
constexpr int64_t kStripSteps = kPanelsPerStrip * kPanelSteps;
constexpr int64_t kTileBytes = kTileSide * kStepBytes;
constexpr int64_t kStepTerms = 2 * kTileSide;

LGK_INLINE __mmask32 terms_kept(int64_t count) { return count < kStepTerms ? (1u << count) - 1 : ~0u; }

// A tile: 16 rows of 64 bytes, `stride` bytes apart.
struct Place {
  const char* from;
  int64_t stride;
};

// `rows` rows of `numbers` packed numbers, with zeros up to whole tiles.
LGK_INLINE void fill_up(const char* from, int64_t stride, int64_t rows, int64_t numbers, char* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows || r % kTileSide != 0; ++r) {
    for (int64_t k = 0; k < numbers; k += kTileSide) {
      const int64_t count = r < rows ? numbers - k : 0;
      const __mmask16 kept = count < kTileSide ? static_cast<__mmask16>((1 << count) - 1) : __mmask16{0xffff};
      _mm512_store_si512(to + r * to_stride + 4 * k, _mm512_maskz_loadu_epi32(kept, from + r * stride + 4 * k));
    }
  }
}

// At most kSums tiles' columns of a right operand, two by two: a step is 16 packed rows of them, the last one maybe
// fewer, filled up with zeros.
struct Columns {
  int64_t tiles = 0, whole = 0;
  Place panels[kPanelsPerStrip][2], last[2];
  alignas(64) char copies[2][2 * kTileBytes];

  Columns() {}  // and not zeros all over

  // Packed rows of panel number `panel`, ldb numbers apart; only the last panel has fewer than kPanel.
  LGK_METHOD void place(int64_t panel, const float* from, int64_t ldb, int64_t half, int64_t width, int64_t depth) {
    const char* bytes = reinterpret_cast<const char*>(from);
    panels[panel][half] = {bytes, 4 * ldb};
    const int64_t left = depth % kTileSide;
    whole = panel * kPanelSteps + depth / kTileSide;
    if (left == 0) return;
    fill_up(bytes + (depth - left) * 4 * ldb, 4 * ldb, left, width * kTileSide, copies[half], 2 * kStepBytes);
    last[half] = {copies[half], 2 * kStepBytes};
  }

  LGK_METHOD Place at(int64_t step, int half) const {
    if (step == whole) return last[half];
    const Place& panel = panels[step / kPanelSteps][half];
    return {panel.from + step % kPanelSteps * kTileSide * panel.stride, panel.stride};
  }
};

// Adds the products of a tile of rows, which is tile 4, and kColumns tiles of columns, 6 and 7, to the sums, 0 to 3.
template <int kColumns, typename Left>
LGK_INLINE void add_step(const Left& left, const Columns& right, int64_t step) {
  static_assert(kColumns <= kSums);
  const Place a = left.at(step), b = right.at(step, 0), d = kColumns > 2 ? right.at(step, 1) : b;
  load_tile<4>(a.from, a.stride);
  each<kColumns>([&](auto j) LGK_ALWAYS {
    load_tile<6 + j % 2, j % 2 * kStepBytes>(j < 2 ? b.from : d.from, j < 2 ? b.stride : d.stride);
    add_pairs<j, 4, 6 + j % 2>();
  });
}

// c[i][j] (+)= the sums over the steps, `rows` rows of them. A step of the left operand is made ready while the one
// before it is multiplied.
template <int kColumns, typename Left>
LGK_INLINE void multiply_tiles(const Left& left, const Columns& right, int64_t steps, int64_t rows, float* c,
                               int64_t ldc, bool add) {
  each<kColumns>([&](auto sum) LGK_ALWAYS { clear_tile<sum>(); });
  left.ready(0);
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) left.ready(step + 1);
    add_step<kColumns>(left, right, step);
  }

  alignas(64) float sums[kTileSide][kColumns * kTileSide];
  const bool in_place = !add && rows == kTileSide;
  float* to = in_place ? c : &sums[0][0];
  const int64_t ld = in_place ? ldc : kColumns * kTileSide;
  each<kColumns>([&](auto j) LGK_ALWAYS { store_tile<j>(to + j * kTileSide, ld * sizeof(float)); });
  if (in_place) return;
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const Vec<float> sum = load(&sums[i][j * kTileSide]);
      float* out = c + i * ldc + j * kTileSide;
      store(out, add ? load(out) + sum : sum);
    }
  }
}

template <typename Left>
LGK_INLINE void multiply_columns(const Left& left, const Columns& right, int64_t steps, int64_t rows, float* c,
                                 int64_t ldc, bool add) {
  const auto run = right.tiles == 4   ? multiply_tiles<4, Left>
                   : right.tiles == 3 ? multiply_tiles<3, Left>
                   : right.tiles == 2 ? multiply_tiles<2, Left>
                                      : multiply_tiles<1, Left>;
  run(left, right, steps, rows, c, ldc, add);
}

// Rows that are read next, fetched into the L2 cache: into the L1 cache they would come too early. The hardware does
// not see streams in 16 rows side by side.
struct Ahead {
  const char* rows;  // null: nothing
  int64_t stride;

  template <int kLines>
  LGK_METHOD void fetch(int64_t step) const {
    if (rows == nullptr) return;
    const char* from = rows + step * kLines * kStepBytes;
#pragma GCC unroll 16
    for (int i = 0; i < kTileSide; ++i, from += stride) {
#pragma GCC unroll 2
      for (int line = 0; line < kLines; ++line) __builtin_prefetch(from + line * kStepBytes, 0, 2);
    }
  }
};

// Left operands: packed rows where they lie, but for a last step of fewer numbers.
struct RowsInPlace {
  Place rows, last;
  int64_t whole;
  Ahead ahead;

  LGK_METHOD void ready(int64_t step) const { ahead.fetch<1>(step); }
  LGK_METHOD Place at(int64_t step) const {
    return step == whole ? last : Place{rows.from + step * kStepBytes, rows.stride};
  }
};

// Copies of steps, one after the other.
struct Steps {
  char* copies;
  int64_t kept;  // a power of 2: so many of the last steps

  LGK_METHOD void ready(int64_t) const {}
  LGK_METHOD char* to(int64_t step) const { return copies + (step & (kept - 1)) * kTileBytes; }
  LGK_METHOD Place at(int64_t step) const { return {to(step), kStepBytes}; }
};

LGK_INLINE __m512i packed_step(const RoundedFloat* from) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + kTileSide), _mm512_loadu_ps(from));
}
LGK_INLINE __m512i packed_step(const Half* from) { return _mm512_loadu_si512(from); }
LGK_INLINE __m512i packed_step(const RoundedFloat* from, __mmask32 kept) {
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), from);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(static_cast<__mmask16>(kept >> 16), from + kTileSide), low);
}
LGK_INLINE __m512i packed_step(const Half* from, __mmask32 kept) { return _mm512_maskz_loadu_epi16(kept, from); }

// Up to 16 rows whose numbers are neighbours, packed a step at a time, zeros where there are no more.
template <typename S>
struct RowsPacked : Steps {
  const S* rows[kTileSide];
  int64_t count, width;
  Ahead ahead;

  LGK_METHOD void ready(int64_t step) const {
    ahead.fetch<kStepTerms * sizeof(S) / kStepBytes>(step);
    char* copy = to(step);
    const int64_t at = step * kStepTerms;
    if (count == kTileSide && width - at >= kStepTerms) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileSide; ++i) {
        _mm512_store_si512(copy + i * kStepBytes, packed_step(rows[i] + at));
      }
      return;
    }
    const __mmask32 kept = terms_kept(width - at);
    for (int64_t i = 0; i < kTileSide; ++i) {
      const __m512i packed = i < count ? packed_step(rows[i] + at, kept) : _mm512_setzero_si512();
      _mm512_store_si512(copy + i * kStepBytes, packed);
    }
  }
};

// A strip of a left operand's rows, and the groups of columns that they are multiplied by.
struct Strip {
  const Rows& a;
  int64_t row, rows, column, width;
  const char* next;  // what is read after them, null where all has been fetched
  float* c;
  int64_t ldc;
  bool add;
  int64_t groups = 0;
  Columns right[kMostGroups];

  // `tiles` of the columns from tile `first` on; b is `all` tiles wide.
  LGK_METHOD void place(const float* b, int64_t all, int64_t first, int64_t tiles) {
    const int64_t depth = (width + 1) / 2;
    for (int64_t t = 0; t < tiles; t += right[groups++].tiles) {
      const int64_t left = tiles - t, count = left == 5 ? 2 : left < kSums ? left : kSums;  // 5: no tile on its own
      right[groups].tiles = count;
      for (int64_t k = 0; k < depth; k += kPanel) {
        const int64_t here = depth - k < kPanel ? depth - k : kPanel;
        for (int64_t j = 0; j < count; j += 2) {
          const int64_t tile = first + t + j, wide = all - tile < 2 ? 1 : 2;
          const float* from = b + (all * k + tile * here) * kTileSide;
          right[groups].place(k / kPanel, from, wide * kTileSide, j / 2, wide, here);
        }
      }
    }
  }

  LGK_METHOD void multiply() const {
    for (int64_t i = 0; i < rows; i += kTileSide) {
      const int64_t count = rows - i < kTileSide ? rows - i : kTileSide, stride = a.row_stride * dtype_bytes(a.dtype);
      const Ahead ahead = {next != nullptr && i + count < rows ? address(i + count) : next, stride};
      if (a.rounded) {
        multiply_packed<RoundedFloat>(i, count, ahead);
      } else if (count < kTileSide || !a.even(row + i, count)) {
        multiply_packed<Half>(i, count, ahead);
      } else {
        multiply_in_place(i, {address(i), stride}, ahead);
      }
    }
  }

 private:
  LGK_METHOD const char* address(int64_t i) const {
    return static_cast<const char*>(a.data) + (a.offset(row + i) + column) * dtype_bytes(a.dtype);
  }

  // The later groups meet what the first one has made ready.
  template <typename Left, typename Ready>
  LGK_METHOD void multiply_all(const Left& left, const Ready& ready, int64_t i, int64_t count) const {
    const int64_t steps = (width + kStepTerms - 1) / kStepTerms;
    float* to = c + i * ldc;
    multiply_columns(left, right[0], steps, count, to, ldc, add);
    for (int64_t g = 1; g < groups; ++g) {
      to += right[g - 1].tiles * kTileSide;
      multiply_columns(ready, right[g], steps, count, to, ldc, add);
    }
  }

  template <typename S>
  void multiply_packed(int64_t i, int64_t count, Ahead ahead) const {
    alignas(64) char copies[kStripSteps * kTileBytes];
    RowsPacked<S> left;
    left.copies = copies;
    left.kept = groups == 1 ? kPanelSteps : kStripSteps;
    left.count = count;
    left.width = width;
    left.ahead = ahead;
    for (int64_t r = 0; r < count; ++r) left.rows[r] = reinterpret_cast<const S*>(address(i + r));
    multiply_all(left, static_cast<const Steps&>(left), i, count);
  }

  void multiply_in_place(int64_t i, Place from, Ahead ahead) const {
    alignas(64) char copy[kTileBytes];
    const RowsInPlace left = {from, {copy, kStepBytes}, width / kStepTerms, ahead};
    for (int64_t r = 0; r < kTileSide && width % kStepTerms != 0; ++r) {
      const Half* last = reinterpret_cast<const Half*>(from.from + r * from.stride + left.whole * kStepBytes);
      _mm512_store_si512(copy + r * kStepBytes, packed_step(last, terms_kept(width % kStepTerms)));
    }
    RowsInPlace fetched = left;
    fetched.ahead.rows = nullptr;
    multiply_all(left, fetched, i, kTileSide);
  }
};

void multiply_strip(const Rows& a, int64_t row, int64_t rows, int64_t column, int64_t width, const float* b,
                    int64_t columns, float* c, int64_t ldc, bool add, const char* next) {
  constexpr int64_t kMost = kMostGroups * kSums;
  const TileScope scope;
  const int64_t tiles = (columns + kTileSide - 1) / kTileSide;
  for (int64_t j = 0; j < tiles; j += kMost) {
    Strip strip = {a, row, rows, column, width, j == 0 ? next : nullptr, c + j * kTileSide, ldc, add};
    strip.place(b, tiles, j, tiles - j < kMost ? tiles - j : kMost);
    strip.multiply();
  }
}

void multiply(const void* a, int64_t stride, int64_t rows, const float* b, int64_t columns, int64_t depth, float* c,
              int64_t ldc, bool add, const Fetch&) {
  multiply_strip(matrix(a, Dtype::kBF16, stride / sizeof(Half), 1), 0, rows, 0, 2 * depth, b, columns, c, ldc, add,
                 nullptr);
}

// The terms of at most kTileSide of the left operand's columns as rows.
LGK_INLINE void transpose_terms(const float* a, int64_t lda, int64_t depth, float* to) {
  alignas(64) float last[kTileSide * kTileSide];
  for (int64_t k = 0; k < depth; k += kTileSide) {
    if (depth - k >= kTileSide) {
      transpose_square(a + k * lda, lda, to + k, kTileLd);
    } else {
      fill_up(reinterpret_cast<const char*>(a + k * lda), 4 * lda, depth - k, kTileSide, reinterpret_cast<char*>(last),
              64);
      transpose_square(last, kTileSide, to + k, kTileLd);
    }
  }
}

void outer(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t columns, int64_t depth,
           float* c, int64_t ldc, bool add) {
  const TileScope scope;
  alignas(64) float terms[kTileSide * kTileLd];
  const RowsInPlace left = {{reinterpret_cast<const char*>(terms), 4 * kTileLd}, {}, INT64_MAX, {}};
  const int64_t tiles = (columns + kTileSide - 1) / kTileSide, steps = (depth + kTileSide - 1) / kTileSide;
  for (int64_t i = 0; i < rows; i += kTileSide) {
    const int64_t count = rows - i < kTileSide ? rows - i : kTileSide;
    transpose_terms(a + i, lda, depth, terms);
    for (int64_t j = 0; j < tiles; j += kSums) {
      const int64_t here = tiles - j < kSums ? tiles - j : kSums;
      Columns right;
      right.tiles = here;
      for (int64_t t = 0; t < here; t += 2) {
        right.place(0, b + (j + t) * kTileSide, ldb, t / 2, here - t < 2 ? 1 : 2, depth);
      }
      float* to = c + i * ldc + j * kTileSide;
      for (int64_t r = 0; r < count && add; ++r) {  // what is added to may lie in memory
        for (int64_t t = 0; t < here; ++t) __builtin_prefetch(to + r * ldc + t * kTileSide, 1);
      }
      multiply_columns(left, right, steps, count, to, ldc, add);
    }
  }
}

}  // namespace

// How operands are packed, which this leaves out, is as in kPairsV4Bf16.
extern const Products<float> kPairsV4Amx;
const Products<float> kPairsV4Amx = {{},     0,       0,       kTileSide, kRowBlock,      0,       0,
                                     kPanel, nullptr, nullptr, multiply,  multiply_strip, nullptr, outer};

}  // namespace lgk
#endif
