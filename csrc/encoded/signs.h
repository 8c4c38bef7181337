// Products of sign codes with few queries by tables of sums, exact within a unit.
//
// A table holds, for four neighbours of a query's numbers, the sum that each of the 16 patterns of their signs makes:
// the nearest of n * u with a whole n of 16 bits. A unit of numbers shares u.
#pragma once
#include "encoded/integers.h"

namespace lgk {

constexpr int64_t kSignRows = 32;          // rows multiplied side by side
constexpr int64_t kSignTable = 8 * kUnit;  // bytes of a unit's tables
constexpr int64_t kScaleUnits = 16;        // units of a vector of a row's scales
constexpr float kLargestSum = 32767;

// Rows of cache lines that are fetched in the order of their addresses, a few at a time: what is asked for too fast the
// processor drops. Into the L1 cache too, or only into the L2 cache.
struct Ahead {
  const uint8_t* row;
  int64_t stride, row_bytes, left, step;
  bool into_l2;
  int64_t at = 0;

  inline __attribute__((always_inline)) void fetch() {
    for (int64_t lines = step < left ? step : left; lines > 0; --lines, --left) {
      if (into_l2) {
        __builtin_prefetch(row + at, 0, 2);
      } else {
        __builtin_prefetch(row + at);
      }
      at += 64;
      if (at >= row_bytes) {
        at = 0;
        row += stride;
      }
    }
  }
};

// What is read next: codes a step with each of a unit's fetches, scales with every kScaleUnits units.
struct Next {
  Ahead codes, scales;
};

struct SignKernels {
  int64_t units_beside;  // whose tables lie together: a divisor of kScaleUnits
  int64_t fetches;       // of what is read next, for a unit of a query
  bool pieces_pay;       // for one query too, with tables that do not fit a cache

  // The largest sum of the magnitudes of four neighbours of x [kUnit]; NaN or Inf if there is one.
  float (*largest_sum)(const float* x);

  // The sums of x [kUnit] * inverse, rounded, go to a unit's places of the tables of the units beside it.
  void (*make_tables)(const float* x, float inverse, int64_t unit, uint8_t* tables);

  // By queries - 1: sums[q][i] += sum over units u of a_scale[i][u] b_scale[q][u] (what row i's codes pick of the
  // tables), in order, for kSignRows rows with so many bytes of codes. tables [units / units_beside][queries]
  // [units_beside * kSignTable] and b_scale [queries][ldb] go on with zeros to whole chunks of 4 units.
  void (*multiply[kFewQueries])(const uint8_t* const* rows, int64_t bytes, const float* const* a_scale, int64_t units,
                                const uint8_t* tables, const float* b_scale, int64_t ldb, float* sums, Next& next);
};

// Null where the instruction set in use has none.
const SignKernels* sign_kernels();

}  // namespace lgk
