// The k best of a query's candidates and of its best so far, by a block of threads: candidates that beat the worst so
// far gather in shared memory behind the best, and are sorted into them whenever there is no room for more.
#pragma once
#include "score_block/cuda_best.cuh"
#include "score_topk/cuda.h"

namespace lgk::score_topk {

constexpr int kThreads = 512, kSlots = 4096;
constexpr int kEach = 4, kAtOnce = kEach * kThreads;  // candidates that are looked at
constexpr int kBytes = kSlots * int(sizeof(uint64_t)) + 16;
static_assert(kMostBest + kAtOnce <= kSlots, "no room for a round of candidates");

struct MergeArgs {
  uint64_t *list, *best;  // [query_count, capacity], [query_count, k]
  uint32_t* counts;       // of the candidates, zeros afterwards
  int64_t capacity, k;
  bool largest;
  float* values;  // [query_count, k]; null where more is to come
  int64_t* indices;
};

// Descending, by all threads; count is a power of two. Ends with a barrier.
__device__ inline void sort_slots(uint64_t* slots, int count) {
  for (int run = 2; run <= count; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < count / 2; i += kThreads) {
        const int low = 2 * i - (i & (apart - 1)), high = low + apart;
        const uint64_t a = slots[low], b = slots[high];
        if ((a < b) == ((low & run) == 0)) slots[low] = b, slots[high] = a;
      }
    }
  }
  __syncthreads();
}

// Sorts the first `filled` slots; what is behind the k best is empty afterwards.
__device__ inline void keep_best(uint64_t* slots, int filled, int k) {
  int count = 2;
  while (count < filled) count *= 2;
  for (int i = filled + int(threadIdx.x); i < count; i += kThreads) slots[i] = 0;
  sort_slots(slots, count);
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeArgs args) {
  extern __shared__ __align__(1024) char shared[];
  auto* slots = reinterpret_cast<uint64_t*>(shared);
  auto* filled = reinterpret_cast<int*>(slots + kSlots);
  const int thread = int(threadIdx.x), k = int(args.k);
  const int64_t q = blockIdx.x, count = args.counts[q];
  const uint64_t* list = args.list + q * args.capacity;
  uint64_t* best = args.best + q * args.k;
  for (int i = thread; i < k; i += kThreads) slots[i] = best[i];
  if (thread == 0) *filled = k;
  __syncthreads();
  uint64_t worst = slots[k - 1];
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int so_far = *filled;
    __syncthreads();  // all know how many there are before there are more
    if (so_far + kAtOnce > kSlots) {
      keep_best(slots, so_far, k);
      worst = slots[k - 1];
      if (thread == 0) *filled = k;
      __syncthreads();
    }
    uint64_t candidates[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t at = first + i * kThreads + thread;
      candidates[i] = at < count ? list[at] : 0;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (candidates[i] > worst) slots[atomicAdd(filled, 1)] = candidates[i];
    }
    __syncthreads();
  }
  keep_best(slots, *filled, k);
  for (int i = thread; i < k; i += kThreads) {
    best[i] = slots[i];
    if (args.values != nullptr) {
      args.values[q * args.k + i] = score_block::score_of(uint32_t(slots[i] >> 32), args.largest);
      args.indices[q * args.k + i] = score_block::row_of(slots[i]);
    }
  }
  if (thread == 0) args.counts[q] = 0;
}

// The block of rows from `start` on, and what is done with its candidates.
struct Block {
  score_block::CudaArgs scores;
  MergeArgs merge;
};

inline int64_t block_rows(const CudaArgs& args, int64_t start) {
  const int64_t left = args.scores.row_count - start;
  const int64_t most = start == 0 ? args.first_block : args.scores.candidates.capacity;
  return left < most ? left : most;
}

inline Block block_of(const CudaArgs& args, int64_t start) {
  Block block = {args.scores, {}};
  score_block::CudaArgs& scores = block.scores;
  scores.row_count = block_rows(args, start);
  const score_block::Operand& rows = args.scores.rows;
  if (rows.encoded.codes == nullptr)
    scores.rows.numbers = rows.numbers.from(start);
  else
    scores.rows.encoded = rows.encoded.from(start);
  score_block::Candidates& to = scores.candidates;
  to.best = args.best, to.first_row = start;
  if (to.row_scale != nullptr) to.row_scale += start * to.row_scale_stride;
  const bool last = start + scores.row_count == args.scores.row_count;
  block.merge = {to.list,     args.best, to.counts, to.capacity, to.k, to.largest, last ? args.values : nullptr,
                 args.indices};
  return block;
}

}  // namespace lgk::score_topk
