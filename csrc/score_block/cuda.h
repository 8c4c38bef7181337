// S[q,n] = sum_d queries[q,d] rows[n,d] on a CUDA device, rows of numbers or of codes with scales, which are converted
// on their way into shared memory.
//
// Both operands are cut into bf16 parts of 8 bits: one for bf16 and for codes, which it holds exactly, two for fp16,
// three for fp32. Products of parts are summed in fp32 on the tensor cores, those below fp32's precision left out; a
// code's scale multiplies sums of at most 64 numbers. A long row is cut into pieces of D, whose sums are added in
// order: same input, same bits.
#pragma once
#include "common/rows.h"
#include "encoded/rows.h"

namespace lgk::score_block {

struct CudaArgs {
  Rows queries, rows;   // of numbers; `rows` is unused where there are codes
  EncodedRows encoded;  // codes null without them
  float* out;           // [query_count, row_count]
  float* partial;       // [pieces, query_count, row_count]; unused where there is one piece
  int64_t query_count, row_count, d;
  int64_t piece, pieces;  // numbers of a piece of D, a multiple of 64, and pieces in all
};

// Queries and rows of a block's tile, and numbers of D that it takes at a time.
struct Tile {
  int queries, rows, depth;
};
Tile tile(int64_t query_count);

// Launches on the stream and returns without waiting; throws std::runtime_error with CUDA's own words on failure.
// Queries are of the rows' dtype or fp32; beside codes fp32, bf16 or fp16.
void score_block_cuda(const CudaArgs& args, void* stream);

}  // namespace lgk::score_block
