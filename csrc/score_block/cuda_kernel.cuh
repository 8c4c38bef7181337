// The kernels behind cuda.h. While a step's tiles are multiplied, the next ones are on their way to registers, and are
// converted as they go into the other half of shared memory.
#pragma once
#include "score_block/cuda_best.cuh"
#include "score_block/cuda_tile.cuh"

namespace lgk::score_block {

// log2 of a power of two.
__device__ inline int log2_of(int64_t power) {
  int log = 0;
  while ((int64_t(1) << log) < power) ++log;
  return log;
}

// The tile of a block, and where it is.
struct Place {
  int64_t q0, n0, end;         // the first query and row, the end of D
  int row_shift, query_shift;  // log2 of the numbers that share a scale
};

__device__ inline float scale_at(const EncodedRows& rows, int64_t row, int64_t at) {
  const int64_t i = row * rows.scale_stride + at;
  return rows.encoding.half_scales ? f16_to_float(static_cast<const uint16_t*>(rows.scales)[i])
                                   : static_cast<const float*>(rows.scales)[i];
}

// A step of the block on its way from memory.
template <class K>
class Step {
 public:
  __device__ void read(const CudaArgs& args, const Place& place, int64_t d) {
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < K::kRowRuns; ++i) {
      const int row = (thread + i * kThreads) / kChunks, chunk = thread % kChunks;
      read_run(rows_[i], args.rows.numbers, args.rows.encoded, place.n0 + row, place.n0 + row < args.row_count,
               d + chunk * K::R::kRun, place.end);
    }
#pragma unroll
    for (int i = 0; i < K::kQueryRuns; ++i) {
      const int row = (thread + i * kThreads) / kChunks, chunk = thread % kChunks;
      read_run(queries_[i], args.queries.numbers, args.queries.encoded, place.q0 + row,
               row < K::kQueries && place.q0 + row < args.query_count, d + chunk * K::Q::kRun, place.end);
    }
#pragma unroll
    for (int i = 0; i < K::kScaleRuns; ++i) {
      const int at = thread + i * kThreads;
      const bool of_row = at < K::kSpans * kRows;
      const int there = of_row ? at : at - K::kSpans * kRows, each = of_row ? kRows : K::kQueries;
      const int64_t number = d + there / each * kScaleUnit, within = number < place.end ? number : d;
      scales_[i] = 0;
      if (of_row) {
        const int64_t row = place.n0 + there % each;
        if (row < args.row_count && d < place.end)
          scales_[i] = scale_at(args.rows.encoded, row, within >> place.row_shift);
      } else if (at < K::kScales) {
        const int64_t row = place.q0 + there % each;
        if (row < args.query_count && d < place.end)
          scales_[i] = scale_at(args.queries.encoded, row, within >> place.query_shift);
      }
    }
  }

  __device__ void store(char* half, const CudaArgs& args) const {
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < K::kRowRuns; ++i) {
      const int row = (thread + i * kThreads) / kChunks;
      store_run<typename K::R, K::kRowTile>(half + K::kRowsAt, row, thread % kChunks, rows_[i],
                                            args.rows.encoded.encoding.code);
    }
#pragma unroll
    for (int i = 0; i < K::kQueryRuns; ++i) {
      const int row = (thread + i * kThreads) / kChunks;
      if (row < K::kQueries)
        store_run<typename K::Q, K::kQueryTile>(half, row, thread % kChunks, queries_[i], Code::kI8);
    }
#pragma unroll
    for (int i = 0; i < K::kScaleRuns; ++i) {
      const int at = thread + i * kThreads;
      if (at < K::kScales) reinterpret_cast<float*>(half + K::kScalesAt)[at] = scales_[i];
    }
    if constexpr (K::kArch == Arch::kSm90) show_to_engine();  // wgmma reads as the engine does
  }

 private:
  Run<typename K::R> rows_[K::kRowRuns];
  Run<typename K::Q> queries_[K::kQueryRuns];
  float scales_[K::kScaleRuns > 0 ? K::kScaleRuns : 1];
};

// Parts of an infinite number, or of one that rounds to infinity in bf16, make NaN of scores that are none: those that
// are NaN are summed anew, of whole numbers in fp32, up to where they are NaN again.
template <class K>
__device__ inline void mend_nans(typename K::Sums& sums, const CudaArgs& args, const Place& place, int64_t begin,
                                 int warp, int lane) {
  constexpr int kSums = K::kDown * K::kAcross * 4;
  static_assert(kSums <= 32, "a bit for each");
  const auto each = [&](const auto& function) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) function(i, sums.c[i / 4 / K::kAcross][i / 4 % K::kAcross][i % 4]);
  };
  uint32_t nans = 0;
  each([&](int i, float sum) { nans |= uint32_t(sum != sum) << i; });
#pragma unroll 1
  for (int at = 0; nans != 0; ++at, nans >>= 1) {
    const int64_t q = place.q0 + K::query(warp) + at / 4 % K::kAcross * 8 + lane % 4 * 2 + at % 2;
    const int64_t n = place.n0 + K::row(warp) + at / 4 / K::kAcross * 16 + lane / 4 + at % 4 / 2 * 8;
    if ((nans & 1) == 0 || q >= args.query_count || n >= args.row_count) continue;
    float score = 0;
#pragma unroll 1
    for (int64_t d = begin; d < place.end && score == score; ++d) {
      score += number_at<typename K::Q>(args.queries.numbers, q, d) * number_at<typename K::R>(args.rows.numbers, n, d);
    }
    each([&](int i, float& sum) { sum = i == at ? score : sum; });
  }
}

// function(query, row, score) for what a thread has of the tile.
template <class K, class Function>
__device__ inline void for_each_score(const typename K::Sums& sums, int warp, int lane, const Function& function) {
#pragma unroll
  for (int j = 0; j < K::kAcross; ++j) {
#pragma unroll
    for (int i = 0; i < K::kDown; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        function(K::query(warp) + j * 8 + lane % 4 * 2 + e % 2, K::row(warp) + i * 16 + lane / 4 + e / 2 * 8,
                 sums.c[i][j][e]);
      }
    }
  }
}

template <class K>
__global__ void __launch_bounds__(kThreads, K::kBlocks) score_kernel(const __grid_constant__ CudaArgs args) {
  if constexpr (K::kCompiled) {
    extern __shared__ __align__(1024) char shared[];
    const int64_t tiles_down = (args.query_count + K::kQueries - 1) / K::kQueries;
    const int64_t begin = int64_t(blockIdx.y) * args.piece, end = begin + args.piece;
    const Place place = {int64_t(blockIdx.x) % tiles_down * K::kQueries,  // tiles of the same rows are neighbours
                         int64_t(blockIdx.x) / tiles_down * kRows, end < args.d ? end : args.d,
                         K::R::kEncoded ? log2_of(args.rows.encoded.encoding.block) : 0,
                         K::kIntegers ? log2_of(args.queries.encoded.encoding.block) : 0};
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    Products<K> products(args.rows.encoded.encoding.block);
    Step<K> step;
    step.read(args, place, begin);
    step.store(shared, args);
    __syncthreads();
    char *now = shared, *next = shared + K::kHalf;
    for (int64_t d = begin; d < place.end; d += K::kDepth) {
      const bool more = d + K::kDepth < place.end;
      if (more) step.read(args, place, d + K::kDepth);
      products.start(now, warp, lane);
      if (more) step.store(next, args);
      products.finish(now, warp, lane);
      __syncthreads();  // all have read `now`, and written `next`
      char* other = now;
      now = next, next = other;
    }
    products.end(warp, lane);
    if constexpr (!K::R::kEncoded && K::kMost > 1) mend_nans<K>(products.sums, args, place, begin, warp, lane);
    if (args.candidates.list != nullptr && args.pieces == 1) {
      keep_candidates<K>(args, products.sums, place.q0, place.n0, reinterpret_cast<uint32_t*>(shared), warp, lane);
      return;
    }
    float* out = args.pieces == 1 ? args.out : args.partial + int64_t(blockIdx.y) * args.query_count * args.row_count;
    for_each_score<K>(products.sums, warp, lane, [&](int query, int row, float score) {
      const int64_t q = place.q0 + query, n = place.n0 + row;
      if (q < args.query_count && n < args.row_count) out[q * args.row_count + n] = score;
    });
  } else {
    __trap();  // this kernel is not for this architecture
  }
}

// out = the sum of the pieces' sums, in order; or all of a block of rows as candidates, each in its own place.
__global__ void add_pieces_kernel(const CudaArgs args) {
  const int64_t size = args.query_count * args.row_count, e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= size) return;
  float total = 0;
  for (int64_t piece = 0; piece < args.pieces; ++piece) total += args.partial[piece * size + e];
  const Candidates& to = args.candidates;
  if (to.list == nullptr) {
    args.out[e] = total;
    return;
  }
  const int64_t q = e / args.row_count, n = e % args.row_count;
  to.list[q * to.capacity + n] = candidate_of(to, n, total);
  if (n == 0) to.counts[q] = uint32_t(args.row_count);
}

}  // namespace lgk::score_block
