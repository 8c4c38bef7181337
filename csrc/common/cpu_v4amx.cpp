// Intel's matrix unit beside AVX-512: products of two operands of bf16.
//
// Operands are packed as pairs, as for AVX512-BF16: so a panel's columns are what a tile of the right operand is. A
// product of tiles adds 16 pairs to an fp32 sum, their even terms and their odd ones on their own, rounds to nearest
// even, takes subnormal operands for 0 and flushes subnormal results to 0.
#include "common/isa.h"

#if LGK_HAS_AMX
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "common/amx.h"
#include "common/kernels.h"

#pragma GCC target( \
    "avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,amx-tile,amx-bf16,amx-int8")

#define LGK_VECTOR_BYTES 64
#define LGK_F16C
#include "common/tile_unit.inc"
#include "common/vectors.inc"

namespace lgk {
namespace {

constexpr int64_t kMostRows = 192;  // that multiply takes at a time: a panel of columns stays in the L1 cache meanwhile
constexpr int kSums = 4;            // tiles of sums

// Rows as tiles read them: whole steps where they lie, and the last one of fewer packed numbers, filled up with zeros,
// where there is one.
struct Operand {
  const char *steps, *last;
  int64_t stride, last_stride;  // bytes from a row to the next
};

// Adds the products of kRows tiles of rows and kColumns tiles of columns to the sums: tiles 0 to 3. Tiles 4 and 5 are
// of rows, 6 and 7 of columns. A panel has two tiles of columns.
template <int kRows, int kColumns>
LGK_INLINE void add_step(const char* a, int64_t lda, const char* b, int64_t ldb, const char* c, int64_t ldc) {
  constexpr auto row = [](int r) { return 4 + r % 2; };
  if constexpr (kColumns == 1) {
    load_tile<6>(b, ldb);
    each<kRows>([&](auto r) LGK_ALWAYS {
      load_tile<row(r)>(a + r * kTileSide * lda, lda);
      add_pairs<r, row(r), 6>();
    });
  } else {
    each<kRows>([&](auto r) LGK_ALWAYS { load_tile<row(r)>(a + r * kTileSide * lda, lda); });
    each<kColumns>([&](auto j) LGK_ALWAYS {
      load_tile<6 + j % 2, j % 2 * kStepBytes>(j < 2 ? b : c, j < 2 ? ldb : ldc);
      each<kRows>([&](auto r) LGK_ALWAYS { add_pairs<r * kColumns + j, row(r), 6 + j % 2>(); });
    });
  }
}

// c[i][j] (+)= the sums over depth packed numbers, `rows` of them in no more than kRows tiles.
template <int kRows, int kColumns>
LGK_INLINE void multiply_tiles(const Operand& a, const Operand* panels, int64_t depth, int64_t rows, float* c,
                               int64_t ldc, bool add) {
  static_assert(kRows * kColumns <= kSums && (kRows <= 2 || kColumns == 1));
  const Operand &b = panels[0], &d = panels[kColumns > 2 ? 1 : 0];
  each<kRows * kColumns>([&](auto sum) LGK_ALWAYS { clear_tile<sum>(); });
  const char *from_a = a.steps, *from_b = b.steps, *from_d = d.steps;
  for (int64_t k = depth / kTileSide; k > 0; --k) {
    add_step<kRows, kColumns>(from_a, a.stride, from_b, b.stride, from_d, d.stride);
    from_a += kStepBytes;
    from_b += kTileSide * b.stride;
    from_d += kTileSide * d.stride;
  }
  if (depth % kTileSide != 0) {
    add_step<kRows, kColumns>(a.last, a.last_stride, b.last, b.last_stride, d.last, d.last_stride);
  }

  alignas(64) float sums[kRows * kTileSide][kColumns * kTileSide];
  const bool in_place = !add && rows == kRows * kTileSide;
  float* to = in_place ? c : &sums[0][0];
  const int64_t ld = in_place ? ldc : kColumns * kTileSide;
  each<kRows>([&](auto r) LGK_ALWAYS {
    each<kColumns>([&](auto j) LGK_ALWAYS {
      store_tile<r * kColumns + j>(to + r * kTileSide * ld + j * kTileSide, ld * sizeof(float));
    });
  });
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

// At most four tiles' columns of a right operand, in two panels.
struct Columns {
  static constexpr int64_t kWidth = 2 * kStepBytes;
  Operand panels[2];
  alignas(64) char last[2][kTileSide * kWidth];

  // Packed rows of a panel's one or two tiles, ldb numbers apart.
  LGK_METHOD void place(int panel, const float* from, int64_t ldb, int64_t tiles, int64_t depth) {
    const char* bytes = reinterpret_cast<const char*>(from);
    panels[panel] = {bytes, last[panel], 4 * ldb, kWidth};
    const int64_t whole = depth / kTileSide * kTileSide;
    if (whole < depth) fill_up(bytes + whole * 4 * ldb, 4 * ldb, depth - whole, tiles * kTileSide, last[panel], kWidth);
  }
};

// Rows of a left operand: whole tiles, or fewer rows than one.
struct LeftRows {
  static constexpr int64_t kStride = kTileLd * sizeof(float);
  alignas(64) char copy[kSums * kTileSide * kStride];

  LGK_METHOD Operand place(const char* from, int64_t stride, int64_t rows, int64_t depth) {
    const int64_t whole = depth / kTileSide * kTileSide;
    if (rows < kTileSide) {
      fill_up(from, stride, rows, depth, copy, kStride);
      return {copy, copy + 4 * whole, kStride, kStride};
    }
    if (whole < depth) fill_up(from + 4 * whole, stride, rows, depth - whole, copy, kStride);
    return {from, copy, stride, kStride};
  }
};

template <int kRows, int kColumns>
void multiply_columns(const char* a, int64_t stride, int64_t rows, const Columns& b, int64_t depth, float* c,
                      int64_t ldc, bool add) {
  constexpr int64_t kMany = kRows * kTileSide;
  LeftRows left;
  int64_t i = 0;
  for (; i + kMany <= rows; i += kMany) {
    const Operand many = left.place(a + i * stride, stride, kMany, depth);
    multiply_tiles<kRows, kColumns>(many, b.panels, depth, kMany, c + i * ldc, ldc, add);
  }
  for (; i < rows; i += kTileSide) {
    const int64_t count = rows - i < kTileSide ? rows - i : kTileSide;
    const Operand few = left.place(a + i * stride, stride, count, depth);
    multiply_tiles<1, kColumns>(few, b.panels, depth, count, c + i * ldc, ldc, add);
  }
}

// Tiles of rows are read once for as many columns as the sums allow.
void multiply(const void* a, int64_t stride, int64_t rows, const float* b, int64_t columns, int64_t depth, float* c,
              int64_t ldc, bool add, const Fetch&) {
  const TileScope scope;
  const char* from = static_cast<const char*>(a);
  const int64_t tiles = (columns + kTileSide - 1) / kTileSide;
  for (int64_t j = 0; j < tiles; j += kSums) {
    Columns right;
    const int64_t count = tiles - j < kSums ? tiles - j : kSums;
    for (int64_t t = 0; t < count; t += 2) {
      const int64_t width = count - t < 2 ? 1 : 2;
      right.place(t / 2, b + (j + t) * kTileSide * depth, width * kTileSide, width, depth);
    }
    const auto run = count == 4   ? multiply_columns<1, 4>
                     : count == 3 ? multiply_columns<1, 3>
                     : count == 2 ? multiply_columns<2, 2>
                                  : multiply_columns<4, 1>;
    run(from, stride, rows, right, depth, c + j * kTileSide, ldc, add);
  }
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
  const char* left = reinterpret_cast<const char*>(terms);
  const int64_t tiles = (columns + kTileSide - 1) / kTileSide, whole = depth / kTileSide * kTileSide;
  const Operand a_rows = {left, left + 4 * whole, 4 * kTileLd, 4 * kTileLd};
  for (int64_t i = 0; i < rows; i += kTileSide) {
    const int64_t count = rows - i < kTileSide ? rows - i : kTileSide;
    transpose_terms(a + i, lda, depth, terms);
    for (int64_t j = 0; j < tiles; j += kSums) {
      Columns right;
      const int64_t here = tiles - j < kSums ? tiles - j : kSums;
      for (int64_t t = 0; t < here; t += 2) {
        right.place(t / 2, b + (j + t) * kTileSide, ldb, here - t < 2 ? 1 : 2, depth);
      }
      float* to = c + i * ldc + j * kTileSide;
      for (int64_t r = 0; r < count && add; ++r) {  // what is added to may lie in memory
        for (int64_t t = 0; t < here; ++t) __builtin_prefetch(to + r * ldc + t * kTileSide, 1);
      }
      const auto run = here == 4   ? multiply_tiles<1, 4>
                       : here == 3 ? multiply_tiles<1, 3>
                       : here == 2 ? multiply_tiles<1, 2>
                                   : multiply_tiles<1, 1>;
      run(a_rows, right.panels, depth, count, to, ldc, add);
    }
  }
}

}  // namespace

// The pairs' products by tiles.
Products<float> tile_products(const Products<float>& pairs) {
  Products<float> products = pairs;
  products.tile_step = kTileSide;
  products.row_block = kMostRows;
  products.few_terms = kPanel;
  products.multiply = multiply;
  products.outer = outer;
  return products;
}

}  // namespace lgk
#endif
