// Scores that may be among the best of their query, on their way out of a tile.
#pragma once
#include "score_block/cuda_tile.cuh"

namespace lgk::score_block {

constexpr uint32_t kNanKey = 0xffffffffu;

// The better the score, the larger the key: one for 0 and -0, the largest for every NaN, 0 for none.
__device__ inline uint32_t key_of(float score, bool largest) {
  if (score != score) return kNanKey;
  const uint32_t bits = float_bits((largest ? score : -score) + 0.f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

__device__ inline float score_of(uint32_t key, bool largest) {
  if (key == kNanKey) return bits_float(0x7fc00000);
  const float score = bits_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
  return largest ? score : -score;
}

__device__ inline int64_t row_of(uint64_t candidate) { return int64_t(0xffffffffu - uint32_t(candidate)); }

__device__ inline uint64_t candidate_of(const Candidates& to, int64_t n, float score) {
  const float scale = to.row_scale == nullptr ? 1.f : to.row_scale[n * to.row_scale_stride];
  const auto row = uint32_t(to.first_row + n);
  return uint64_t(key_of(score * scale, to.largest)) << 32 | (0xffffffffu - row);
}

// Appends what beats the worst of each query's best so far. Which place a candidate gets depends on which block comes
// first; no answer depends on the place. `counts` [K::kQueries] is shared memory that is free.
template <class K>
__device__ inline void keep_candidates(const CudaArgs& args, const typename K::Sums& sums, int64_t q0, int64_t n0,
                                       uint32_t* counts, int warp, int lane) {
  const Candidates& to = args.candidates;
  const auto each = [&](const auto& function) {
#pragma unroll
    for (int j = 0; j < K::kAcross; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = K::query(warp) + j * 8 + lane % 4 * 2 + h;
        if (q0 + query >= args.query_count) continue;
        const uint64_t worst = to.best[(q0 + query) * to.k + to.k - 1];
#pragma unroll
        for (int i = 0; i < K::kDown; ++i) {
#pragma unroll
          for (int e = h; e < 4; e += 2) {
            const int64_t n = n0 + K::row(warp) + i * 16 + lane / 4 + e / 2 * 8;
            if (n >= args.row_count) continue;
            const uint64_t candidate = candidate_of(to, n, sums.c[i][j][e]);
            if (candidate > worst) function(query, candidate);
          }
        }
      }
    }
  };
  for (int query = int(threadIdx.x); query < K::kQueries; query += kThreads) counts[query] = 0;
  __syncthreads();
  each([&](int query, uint64_t) { atomicAdd(counts + query, 1u); });
  __syncthreads();
  for (int query = int(threadIdx.x); query < K::kQueries; query += kThreads) {
    if (counts[query] != 0) counts[query] = atomicAdd(to.counts + q0 + query, counts[query]);
  }
  __syncthreads();  // counts are places in the lists now
  each([&](int query, uint64_t candidate) {
    to.list[(q0 + query) * to.capacity + atomicAdd(counts + query, 1u)] = candidate;
  });
}

}  // namespace lgk::score_block
