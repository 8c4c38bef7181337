// values, indices = the k best of S[q,n] = row_scale[n] sum_d queries[q,d] rows[n,d] on a CUDA device, best first.
//
// Order: NaN first, then by score, then by row number. Rows are taken in blocks: score_block's kernels score a block
// and append what beats the worst of a query's best so far to its candidates, then a block of threads a query keeps the
// k best of both. Memory beside the answer: 8 bytes a candidate, of which a block may have as many as it has scores.
#pragma once
#include "score_block/cuda.h"

namespace lgk::score_topk {

constexpr int kMostBest = 2048;  // k

struct CudaArgs {
  score_block::CudaArgs scores;  // over all rows; of the candidates, `best` and first_row are set here
  uint64_t* best;                // [query_count, k], zeros
  int64_t first_block;           // rows of the first block; the others have as many as there may be candidates
  float* values;                 // [query_count, k]
  int64_t* indices;
};

// Launches on the stream and returns without waiting; throws std::runtime_error with CUDA's own words on failure.
// candidates.counts [query_count] are zeros before and after; 1 <= k <= kMostBest and k <= rows < 2^32. D is cut into
// pieces only where one block takes all rows.
void score_topk_cuda(Arch arch, const CudaArgs& args, void* stream);

}  // namespace lgk::score_topk
