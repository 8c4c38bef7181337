// A tile of 128 rows against some queries, rows of 128 bytes of either in shared memory: how it is cut among 8 warps,
// and its products, by mma.sync on sm_80 and by wgmma on sm_90a. Both leave the fragments of m16n8, rows along m: a
// thread has rows g and g + 8 of each 16, columns 2 t and 2 t + 1 of each 8 queries, g = lane / 4, t = lane % 4.
#pragma once
#include <type_traits>

#include "common/cuda_bulk.cuh"
#include "common/cuda_numbers.cuh"
#include "score_block/cuda.h"

namespace lgk::score_block {

constexpr int kThreads = 256, kRows = 128, kChunks = 8;
constexpr int kScaleUnit = 32;  // numbers; no fewer share a scale

// Sums of a warp's share: of products of bf16 in fp32, of int8 in int32.
template <class T, int kDown, int kAcross>
struct Fragments {
  T c[kDown][kAcross][4];
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
      }
    }
  }
};

template <Arch kArch_, class Q_, class R_, int kQueries_>
struct Kernel {
  using Q = Q_;
  using R = R_;
  static constexpr Arch kArch = kArch_;
  static constexpr bool kCompiled = kArch == Arch::kSm80 || kIsSm90;
  static constexpr int kQueries = kQueries_, kMost = Q::kParts > R::kParts ? Q::kParts : R::kParts;
  // with two parts on both sides all four products count, with three those of small parts by small ones do not
  static constexpr int kKept = kMost == 2 && Q::kParts == R::kParts ? 3 : kMost;
  static constexpr bool kIntegers = R::kRun == 16;
  static constexpr int kDepth = kChunks * R::kRun;  // numbers of a step
  static_assert(Q::kRun == R::kRun, "both sides are bf16, or both are int8");

  // How warps share a tile: on sm_90a each group of four has 64 rows.
  static constexpr int kWarpsAcross = kArch == Arch::kSm80 && kQueries >= 64 ? 2 : 1;
  static constexpr int kWarpsDown = kThreads / kWarp / kWarpsAcross;
  static constexpr int kDown = kRows / kWarpsDown / 16, kAcross = kQueries / kWarpsAcross / 8;
  __device__ static int row(int warp) { return warp / kWarpsAcross * kDown * 16; }
  __device__ static int query(int warp) { return warp % kWarpsAcross * kAcross * 8; }
  using Sums = Fragments<float, kDown, kAcross>;

  // Products are summed by themselves for a step or several: where they are to be scaled, and because the tensor cores
  // cut every sum off towards zero, by more where it is large. On sm_80 blocks of a scale may be shorter than a step.
  static constexpr int kTogether = !R::kEncoded && kMost == 1 ? 8 : 1;  // steps
  static constexpr int kSpans = !R::kEncoded ? 0 : kArch == Arch::kSm80 ? kDepth / kScaleUnit : 1;
  using Parts = Fragments<std::conditional_t<kIntegers, int32_t, float>, kDown, kAcross>;

  // Half of shared memory: tiles of both sides' parts, then scales [kSpans][rows], and of queries [kSpans][queries].
  static constexpr int kQueryTile = kQueries * kTileRowBytes, kRowTile = kRows * kTileRowBytes;
  static constexpr int kRowsAt = Q::kParts * kQueryTile, kScalesAt = kRowsAt + R::kParts * kRowTile;
  static constexpr int kScaled = kRows + (kIntegers ? kQueries : 0), kScales = kSpans * kScaled;
  static constexpr int kHalf = (kScalesAt + kScales * 4 + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static constexpr int kBytes = 2 * kHalf;
  static constexpr int kQueryRuns = (kQueries * kChunks + kThreads - 1) / kThreads;
  static constexpr int kRowRuns = kRows * kChunks / kThreads;
  static constexpr int kScaleRuns = (kScales + kThreads - 1) / kThreads;
  static constexpr int kBlocks = kQueries <= 16 || (kArch == Arch::kSm90 && kQueries <= 64 && kMost == 1) ? 2 : 1;
};

__device__ inline void multiply_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_bf16(c, a, b0, b1);
}
__device__ inline void multiply_16(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_s8(c, a, b0, b1);
}
template <int kAcross>
__device__ inline void multiply_64(float (&c)[kAcross][4], uint64_t a, uint64_t b) {
  multiply_group_bf16(c, a, b);
}
template <int kAcross>
__device__ inline void multiply_64(int32_t (&c)[kAcross][4], uint64_t a, uint64_t b) {
  multiply_group_s8(c, a, b);
}

// part += products over chunks `chunk` and the next one, by a warp; those of small parts first.
template <class K, class Part>
__device__ inline void multiply_chunks(Part& part, const char* half, int chunk, int warp, int lane) {
#pragma unroll
  for (int p = K::Q::kParts - 1; p >= 0; --p) {
    uint32_t b[K::kAcross / 2][4];
#pragma unroll
    for (int j = 0; j < K::kAcross / 2; ++j) {
      const int at = K::query(warp) + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(b[j], half + p * K::kQueryTile + tile_offset<kChunks>(at, chunk + lane / 8 % 2));
    }
#pragma unroll
    for (int r = K::R::kParts - 1; r >= 0; --r) {
      if (p + r >= K::kKept) continue;
#pragma unroll
      for (int i = 0; i < K::kDown; ++i) {
        uint32_t a[4];
        const int at = K::row(warp) + i * 16 + lane % 16;
        load_matrices(a, half + K::kRowsAt + r * K::kRowTile + tile_offset<kChunks>(at, chunk + lane / 16));
#pragma unroll
        for (int j = 0; j < K::kAcross; ++j) multiply_16(part.c[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// part += all products of a step, by a warp group; complete once they have been waited for.
template <class K, class Part>
__device__ inline void multiply_step(Part& part, const char* half, int warp) {
  const uint32_t queries = shared_address(half);
  const uint32_t rows = shared_address(half + K::kRowsAt) + uint32_t(warp / 4 * 64 * kTileRowBytes);
#pragma unroll
  for (int p = K::Q::kParts - 1; p >= 0; --p) {
#pragma unroll
    for (int r = K::R::kParts - 1; r >= 0; --r) {
      if (p + r >= K::kKept) continue;
#pragma unroll
      for (int column = 0; column < kTileRowBytes; column += 32) {
        multiply_64(part.c[0], matrix_descriptor(rows + uint32_t(r * K::kRowTile), column),
                    matrix_descriptor(queries + uint32_t(p * K::kQueryTile), column));
      }
    }
  }
}

// sums += part, times the scales of the span where there are scales.
template <class K>
__device__ inline void add_scaled(typename K::Sums& sums, const typename K::Parts& part, const char* half, int span,
                                  int warp, int lane) {
  const float* of_rows = reinterpret_cast<const float*>(half + K::kScalesAt) + span * kRows + K::row(warp) + lane / 4;
  const float* of_queries = reinterpret_cast<const float*>(half + K::kScalesAt) + K::kSpans * kRows +
                            span * K::kQueries + K::query(warp) + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < K::kDown; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float scale = K::R::kEncoded ? of_rows[i * 16 + h * 8] : 1.f;
#pragma unroll
      for (int j = 0; j < K::kAcross; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          float v = float(part.c[i][j][e]);
          if constexpr (K::kIntegers) v *= of_queries[j * 8 + e % 2];
          sums.c[i][j][e] += v * scale;
        }
      }
    }
  }
}

// The products of one step after the other, begun by start and complete after finish; in `sums` after end. What lies
// between start and finish runs beside the tensor cores of sm_90a; on sm_80 start does it all.
template <class K>
class Products {
 public:
  typename K::Sums sums;

  __device__ explicit Products(int64_t block)  // numbers that share a scale
      : together_(block >= K::kDepth ? 4 : int(block) * 4 / K::kDepth) {
    sums.clear();
  }

  __device__ void start(const char* half, int warp, int lane) {
    if (held_ == 0) part_.clear();
    if constexpr (K::kArch == Arch::kSm90) {
      begin_products();
      multiply_step<K>(part_, half, warp);
      commit_products();
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // 32 bytes of each row
        multiply_chunks<K>(part_, half, 2 * i, warp, lane);
        if (K::R::kEncoded && i < 3 && (i + 1) % together_ == 0) add_span(half, i, warp, lane), part_.clear();
      }
      add_part(half, 3, warp, lane);
    }
  }

  __device__ void finish(const char* half, int warp, int lane) {
    if constexpr (K::kArch == Arch::kSm90) {
      wait_for_products<0>();
      take_products(part_.c[0]);
      add_part(half, 0, warp, lane);
    }
  }

  __device__ void end(int warp, int lane) {
    if (held_ > 0) add_scaled<K>(sums, part_, nullptr, 0, warp, lane);
  }

 private:
  // The end of a step, of which quarter i is the last one to be added.
  __device__ void add_part(const char* half, int i, int warp, int lane) {
    if (K::kTogether > 1 && ++held_ < K::kTogether) return;
    held_ = 0;
    add_span(half, i, warp, lane);
  }

  // What ends with quarter i of a step.
  __device__ void add_span(const char* half, int i, int warp, int lane) {
    const int first = i / together_ * together_;
    add_scaled<K>(sums, part_, half, first * (K::kDepth / 4) / kScaleUnit, warp, lane);
  }

  typename K::Parts part_;
  int together_;  // quarters of a step that share a scale
  int held_ = 0;  // steps in part_ that are not in `sums`
};

}  // namespace lgk::score_block
